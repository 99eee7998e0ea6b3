"""A dual encoder for images and captions, its backdoor and its repair: the smallest honest version of that system."""
