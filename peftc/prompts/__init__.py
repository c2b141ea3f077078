"""Virtual tokens, whole: finding the calls they enter, splicing them in, caches, what is saved."""
