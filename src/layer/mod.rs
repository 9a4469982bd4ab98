//! Writable layers over stored trees.
