"""What tests of operations need, such as galleries to erase from."""
