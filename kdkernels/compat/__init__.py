"""Drop-in modules: the losses of other libraries under their own names, signatures and results."""
