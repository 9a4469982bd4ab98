//! Tables for people: columns aligned, numbers to the right.

use std::fmt;

/// Rows under a head. The last column is not padded.
pub struct Table {
    head: &'static [&'static str],
    /// Which columns are numbers.
    right: &'static [usize],
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &'static [&'static str], right: &'static [usize]) -> Self {
        Self {
            head,
            right,
            rows: Vec::new(),
        }
    }

    /// Adds a row with as many cells as the head.
    pub fn row(&mut self, cells: impl Into<Vec<String>>) {
        self.rows.push(cells.into());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths: Vec<usize> = self.head.iter().map(|cell| cell.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let head: Vec<String> = self.head.iter().map(|cell| (*cell).to_owned()).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            let last = row.len().saturating_sub(1);
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column > 0 {
                    f.write_str("  ")?;
                }
                match (self.right.contains(&column), column == last) {
                    (true, _) => write!(f, "{cell:>width$}")?,
                    (false, true) => f.write_str(cell)?,
                    (false, false) => write!(f, "{cell:<width$}")?,
                }
            }
            f.write_str("\n")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_aligned_to_the_left_and_numbers_to_the_right() {
        let mut table = Table::new(&["NAME", "SIZE", "TREE"], &[1]);
        table.row(["local/ä".to_owned(), "1.5Mi".to_owned(), "abc".to_owned()]);
        table.row(["b".to_owned(), "7".to_owned(), "de".to_owned()]);
        assert_eq!(
            table.to_string(),
            "NAME      SIZE  TREE\nlocal/ä  1.5Mi  abc\nb            7  de\n"
        );
    }
}
