"""What a torch file holds, told by a process of its own, which knows the standard library only and can open nothing.

`process` is that process, `stand_ins` the names that a pickle may ask for, `archives` where things lie in a file,
`answer` what is told of it, and `names` what a pickle asks for, without opening it.
"""
