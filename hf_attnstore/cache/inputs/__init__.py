"""What a prompt is made of beside token ids, and what identifies it."""
