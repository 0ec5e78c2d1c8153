"""What surrounds a rule: preparation of gradients, scaling of directions, weight decay, application, and after-work."""
