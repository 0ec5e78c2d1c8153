"""Speed and memory of piste against torch's own optimizers: ``make bench``."""
