//! The likely meaning of a mistyped key or option.

/// ` (did you mean WORD?)` with the known word nearest to an unknown one, or nothing if more than a
/// third of its characters are wrong.
pub fn hint<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known.map(|word| (distance(&unknown.to_lowercase(), word), word)).min();
    match near.filter(|(distance, _)| *distance <= unknown.chars().count() / 3) {
        Some((_, word)) => format!(" (did you mean {word}?)"),
        None => String::new(),
    }
}

/// The same for an option in a usage text; a value may be joined to the unknown one: `--tag=bob`.
pub fn option_hint(unknown: &str, usage: &str) -> String {
    let words = usage.split(['[', ']', ' ', ',', '\n']);
    let (name, _) = unknown.split_once('=').unwrap_or((unknown, ""));
    hint(name, words.filter(|word| word.starts_with('-')))
}

/// How many characters to insert, delete or replace to get from one word to the other
/// (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for a in from.chars() {
        let mut left = row.first().map_or(0, |above| above.saturating_add(1));
        let mut next = vec![left];
        for (b, above) in to.chars().zip(row.windows(2)) {
            let [diagonal, above] = *above else { continue };
            let replaced = diagonal.saturating_add(usize::from(a != b));
            left = replaced.min(left.min(above).saturating_add(1));
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let table = [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("abc", "abc", 0),
            ("abc", "xabc", 1),
            ("abc", "ac", 1),
            ("abc", "abx", 1),
            ("ab", "ba", 2),
            ("kitten", "sitting", 3),
            ("é", "e", 1),
        ];
        for (a, b, expected) in table {
            assert_eq!((distance(a, b), distance(b, a)), (expected, expected), "{a} {b}");
        }
    }

    #[test]
    fn hints() {
        let table = [
            ("--lgfile", " (did you mean --logfile?)"),
            ("--HLEP", " (did you mean --help?)"),
            ("--logfile=/var/log/x", " (did you mean --logfile?)"),
            ("-tt", " (did you mean -t?)"),
            ("-x", ""),
            ("xyz", ""),
            ("--hxyz", ""),
            ("", ""),
        ];
        for (unknown, expected) in table {
            let usage = "usage: x [-t] [--logfile FILE]\n  -h, --help  xyz hxyz";
            assert_eq!(option_hint(unknown, usage), expected, "{unknown}");
        }
    }
}
