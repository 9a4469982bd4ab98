//! Where a tree comes from.
