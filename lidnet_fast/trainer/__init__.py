"""The standard trainer: phases detector -> denoiser -> collaborate, on Lightning."""
