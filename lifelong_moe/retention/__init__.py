"""What holds old knowledge in place: the teacher that a stage distils from."""
