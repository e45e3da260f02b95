"""What is wrong with a data set: duplicates, leaks, unreadable and odd images, and a page to look at them."""
