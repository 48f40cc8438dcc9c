"""How much of its context a model uses: effective context, recall of a key, and their figures."""
