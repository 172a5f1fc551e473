"""Commands that look into a data set: print, verify, view, unpack."""
