"""What a user adds to the kit, each in one file."""
