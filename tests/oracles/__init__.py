"""Independent expectations: formulas typed from the papers, and helpers to run other people's optimizers."""
