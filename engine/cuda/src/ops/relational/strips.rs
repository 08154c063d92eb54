//! How the matrix of all pairs is shared out among blocks.

/// How a strip of rows is shared out: tiles of rows in a strip, parts of the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strips {
    pub(super) tiles: usize,
    pub(super) parts: usize,
}

impl Strips {
    /// The cheapest: `rows` × `cols` tiles on `processors` blocks at a time, at most `most` tiles of rows in a strip, a
    /// multiple of `side` where tiles are that many together.
    pub(super) fn new(rows: usize, cols: usize, processors: usize, most: usize, side: usize) -> Self {
        let [rows, processors, most] = [rows.div_ceil(side), (processors / side).max(1), most / side];
        let found = Strips::of_ones(rows, cols, processors, most);
        Strips { tiles: side * found.tiles, ..found }
    }

    fn of_ones(rows: usize, cols: usize, processors: usize, most: usize) -> Self {
        // In tiles: what the start and the merging of a strip take.
        const STRIP: usize = 2;
        let cost = |s: &Strips| {
            let waves = (s.tiles * s.parts).div_ceil(processors);
            rows.div_ceil(s.tiles) * (waves * cols.div_ceil(s.parts) + STRIP)
        };
        let heights = (1..=most.clamp(1, rows.max(1))).rev();
        let all = heights.flat_map(|tiles| {
            (1..=4).map(move |waves| Strips { tiles, parts: (waves * processors / tiles).clamp(1, cols.max(1)) })
        });
        all.min_by_key(cost).unwrap_or(Strips { tiles: 1, parts: 1 })
    }
}
