"""pyops in the place of other packages' compiled parts."""
