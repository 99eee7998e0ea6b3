"""Reading what a stranger wrote: bounded in size and time, nothing in it is run, nothing outside is opened.

`opening` is the door to every file, `texts` reads JSON, YAML and CSV, `images` pictures, and `torchfiles` what
`torch.save` wrote, by way of `_reader`, a process of its own.
"""
