"""What every trainer needs: records, examples, loss, and the loop around them."""
