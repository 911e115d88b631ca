"""What model families are made of, a file for each part: several families share one. A family's own facts stand in its
own file."""
