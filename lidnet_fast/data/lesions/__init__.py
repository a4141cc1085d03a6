"""Lesions that are known exactly: drawn analytically through a scanner's blur, and put into CT without annotations."""
