"""What a site knows about its data and what of it may leave."""
