"""The loss of held-out text, token by token: ours, by other people's protocols, and a baseline's."""
