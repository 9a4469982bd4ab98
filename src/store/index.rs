//! Numbers for digests: what a pass over many manifests needs to know a content again, at 4 to 8 bytes each.

use std::hash::{BuildHasher, RandomState};

use super::Digest;

const EMPTY: u32 = u32::MAX;

/// A hash table of the numbers 0, 1, 2, … of digests that are kept elsewhere, in the order of the numbers.
pub(super) struct Index {
    /// A power of two of places, at most three quarters of them taken; a taken one holds a number.
    slots: Vec<u32>,
    len: u32,
    /// Manifests are what others wrote: who could foresee the places could make all digests meet in one.
    keys: RandomState,
}

impl Index {
    pub fn new() -> Self {
        Self {
            slots: vec![EMPTY; 16],
            len: 0,
            keys: RandomState::new(),
        }
    }

    /// The number of a digest. `at` tells the digest of a number.
    pub fn get(&self, digest: &Digest, at: impl Fn(u32) -> Digest) -> Option<u32> {
        match self.slots[self.place(digest, at)] {
            EMPTY => None,
            number => Some(number),
        }
    }

    /// The number of a digest, and whether it is new. A new one gets the next number, and the caller adds it to what
    /// `at` looks into. As there are fewer digests in memory than 2^32, the numbers suffice.
    pub fn insert(&mut self, digest: &Digest, at: impl Fn(u32) -> Digest) -> (u32, bool) {
        if (self.len as usize + 1) * 4 > self.slots.len() * 3 {
            self.grow(&at);
        }
        let place = self.place(digest, at);
        match self.slots[place] {
            EMPTY => {
                let number = self.len;
                self.slots[place] = number;
                self.len += 1;
                (number, true)
            }
            number => (number, false),
        }
    }

    fn grow(&mut self, at: impl Fn(u32) -> Digest) {
        self.slots = vec![EMPTY; self.slots.len() * 2];
        for number in 0..self.len {
            let place = self.place(&at(number), &at);
            self.slots[place] = number;
        }
    }

    /// Where the digest is, or would be.
    fn place(&self, digest: &Digest, at: impl Fn(u32) -> Digest) -> usize {
        let mask = self.slots.len() - 1;
        let mut place = self.keys.hash_one(digest) as usize & mask;
        loop {
            match self.slots[place] {
                EMPTY => return place,
                number if at(number) == *digest => return place,
                _ => place = (place + 1) & mask,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::digest_of;

    #[test]
    fn every_digest_keeps_the_number_that_it_got_first() {
        let mut digests: Vec<Digest> = Vec::new();
        let mut index = Index::new();
        for round in 0..3 {
            for value in 0..5000u32 {
                let digest = digest_of(&value.to_be_bytes());
                assert_eq!(
                    index.get(&digest, |number| digests[number as usize]),
                    (round > 0).then_some(value)
                );
                let inserted = index.insert(&digest, |number| digests[number as usize]);
                assert_eq!(inserted, (value, round == 0));
                if inserted.1 {
                    digests.push(digest);
                }
            }
        }
        assert_eq!(index.get(&digest_of(b"other"), |number| digests[number as usize]), None);
        assert!(index.slots.len() <= 8192, "{}", index.slots.len());
    }
}
