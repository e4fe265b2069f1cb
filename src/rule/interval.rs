//! Intervals such as `90`, `10m`, `25h`.

/// The longest timeout of an address in a set, in seconds: the kernel counts
/// milliseconds in 31 bits (ip_set_timeout.h).
pub const LONGEST_IN_SET: u32 = 2_147_483;

/// The longest interval in seconds, ten years: anything longer is a mistake, or means 0.
const LONGEST: u64 = 3_650 * 86_400;

/// How to write an interval.
pub const FORM: &str = "up to 9 digits and s, m, h or d, as in 10m, at most 3650d";

/// Parses `1*9DIGIT [ "s" / "m" / "h" / "d" ]`, in seconds without a unit, into
/// seconds. `None` for anything else, and for more than [`LONGEST`].
pub fn parse(text: &str) -> Option<u64> {
    let units = [('s', 1), ('m', 60), ('h', 3_600), ('d', 86_400)];
    let split = |(letter, seconds)| Some((text.strip_suffix(letter)?, seconds));
    let (digits, unit) = units.into_iter().find_map(split).unwrap_or((text, 1));
    let plain = digits.len() <= 9 && super::is_number(digits);
    let number = digits.parse::<u64>().ok().filter(|_| plain)?;
    number.checked_mul(unit).filter(|seconds| *seconds <= LONGEST)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn intervals() {
        let table = [
            ("0", Some(0)),
            ("90", Some(90)),
            ("1s", Some(1)),
            ("10m", Some(600)),
            ("25h", Some(90_000)),
            ("007d", Some(604_800)),
            ("3650d", Some(315_360_000)),
            ("3651d", None),
            ("315360000", Some(315_360_000)),
            ("315360001", None),
            ("5256000m", Some(315_360_000)),
            ("87600h", Some(315_360_000)),
            ("999999999d", None),
            ("1000000000", None),
            ("", None),
            ("m", None),
            ("-1", None),
            ("+1", None),
            ("1 m", None),
            ("1M", None),
            ("1mm", None),
            ("1.5h", None),
            ("١", None),
        ];
        for (text, seconds) in table {
            assert_eq!(parse(text), seconds, "{text}");
        }
    }
}
