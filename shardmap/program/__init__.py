"""What one sample does, as frozen data: the program, and what is known of its operators."""
