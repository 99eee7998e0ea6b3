"""Reading what a stranger wrote: bounded in size and time, nothing in it is run, nothing outside is opened.

`opening` is the door to every file, `texts` reads JSON, YAML and CSV, `images` pictures, `arrays` .npy files, and
`torchfiles` what `torch.save` wrote, by way of `reader`, a process of its own.
"""
