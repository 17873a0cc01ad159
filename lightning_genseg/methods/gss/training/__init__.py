"""What GSS is built on: training of tokenizers and colours."""
