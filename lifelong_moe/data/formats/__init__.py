"""From the bytes of a file to its text: kinds of files, encodings, and the text of HTML. Pure."""
