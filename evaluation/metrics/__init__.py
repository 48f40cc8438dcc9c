"""How right an answer is: accuracy and F1, ROUGE, string match. Text in, numbers out."""
