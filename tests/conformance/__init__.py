"""What every registered format and every registered solver must satisfy."""
