//! What is a size or a duration, and what is none. The unit tests of `src/api` ask larder's own parsers about these
//! tables, the tests of the schemas ask the API server.

/// Texts of sizes, with their bytes.
pub const SIZES: [(&str, u64); 23] = [
    ("0", 0),
    ("1", 1),
    ("1.5Gi", 1_610_612_736),
    ("10G", 10_000_000_000),
    ("1e3", 1000),
    ("1E3", 1000),
    ("1E", 1_000_000_000_000_000_000),
    ("1Ei", 1 << 60),
    ("500k", 500_000),
    (".5Gi", 536_870_912),
    ("+5Gi", 5_368_709_120),
    ("5.Gi", 5_368_709_120),
    ("0.1Ki", 103),
    ("2.1Gi", 2_254_857_831),
    ("2254857830400m", 2_254_857_831),
    ("7T", 7_000_000_000_000),
    ("3M", 3_000_000),
    ("0.000001M", 1),
    ("9223372036854775806", i64::MAX as u64 - 1),
    ("1.00000000000000000000000000Gi", 1 << 30),
    ("00000000000000000000000000001Gi", 1 << 30),
    ("1000m", 1),
    ("0e99", 0),
];

/// Texts that are no sizes, or none that are taken.
pub const NO_SIZES: [&str; 36] = [
    "",
    "-1",
    "-1Gi",
    "8Ei",
    "9223372036854775807",
    "9223372036854775808",
    "100E",
    "1e30",
    "1e99",
    "1gi",
    "1GiB",
    "1 Gi",
    " 1Gi",
    "1Gi ",
    "1Gi\n",
    "1\n1Gi",
    "0x10",
    "1_000",
    "٣Gi",
    "NaN",
    "Inf",
    "500K",
    "100m",
    "999m",
    "0.5",
    "1..5Gi",
    "+-1",
    ".",
    "+",
    "Gi",
    "1e",
    "1e-3",
    "1e100",
    "111111111111111111111111111111111",
    "2E6024865272343",
    "10%",
];

/// What keeps the API server's quantity parser busy for minutes: <https://github.com/kubernetes/kubernetes/issues/141166>.
pub const ENDLESS_SIZES: [&str; 6] = [
    "2E6024865272343",
    "2e6024865272343",
    "+2E+6024865272343",
    "1e-6024865272343",
    ".1E999999999",
    "-3e6024865272343",
];

/// Texts of durations, with their seconds.
pub const DURATIONS: [(&str, u64); 8] = [
    ("30d", 2_592_000),
    ("2w", 1_209_600),
    ("36h", 129_600),
    ("1h30m", 5_400),
    ("90s", 90),
    ("1d12h", 129_600),
    ("1w1d1h1m1s", 694_861),
    ("99999w", 99_999 * 604_800),
];

/// Texts that are no durations.
pub const NO_DURATIONS: [&str; 17] = [
    "",
    "30",
    "-1h",
    "1.5.5h",
    "1.5h",
    "P30D",
    "99999999999w",
    "1M",
    "1h1h",
    "1m1h",
    "12h1d",
    "h",
    "1 h",
    "1h 30m",
    "١h",
    "soon",
    "1d\n",
];
