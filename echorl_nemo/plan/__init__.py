"""`echorl-nemo plan`: checks a run and estimates its memory, time and network volume before it gets a GPU."""
