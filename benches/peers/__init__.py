"""What stands beside our kernels: natural eager code and the best mode of torch.compile."""
