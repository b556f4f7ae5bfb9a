"""Tables of methods by bits on real models: the evidence behind what the documentation says of quality."""
