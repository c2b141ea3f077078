"""What other packages have to know of peftc, told to them where they look."""
