"""What is not the paper's system: nobody has to read it to understand or train EMANet."""
