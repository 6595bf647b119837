"""Papers as thin trainers on fastclust's ops: one paper, one file, run as `python -m methods.<paper>`."""
