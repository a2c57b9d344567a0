"""Task packs: real question sets, read at run time, with frozen items."""
