"""What dit-bench times: forwards, generations, decoders, operators, memory."""
