//! What somebody probably meant by a name that does not exist.

/// Names longer than this are not compared.
const LONGEST: usize = 64;

/// The known name that `word` most probably stands for: the same but for case, hyphens and underscores, or at most two
/// edits away (one for short names). `None` if nothing is near.
#[must_use]
pub fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.is_empty() || word.len() > LONGEST {
        return None;
    }
    let folded = fold(word);
    let mut best: Option<(usize, &'a str)> = None;
    for name in known {
        let other = fold(name);
        let allowed = if other.len().min(folded.len()) <= 4 { 1 } else { 2 };
        let distance = if folded == other { 0 } else { edits(&folded, &other) };
        if distance <= allowed && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, name));
        }
    }
    best.map(|(_, name)| name)
}

fn fold(name: &str) -> Vec<char> {
    name.chars().filter(|c| !matches!(c, '_' | '-' | '.' | ' ')).flat_map(char::to_lowercase).collect()
}

/// Levenshtein's distance.
fn edits(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut last = i + 1;
        let mut diagonal = i;
        let mut next = Vec::with_capacity(row.len());
        next.push(last);
        for (y, above) in b.iter().zip(row.iter().skip(1)) {
            let here = (last + 1).min(above + 1).min(diagonal + usize::from(x != y));
            diagonal = *above;
            last = here;
            next.push(here);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        let known = ["topic", "to", "payload", "collapse_id", "ttl_seconds", "push_type"];
        let guess = |word| closest(word, known);
        assert_eq!(guess("collapseId"), Some("collapse_id"));
        assert_eq!(guess("collapse-id"), Some("collapse_id"));
        assert_eq!(guess("paylaod"), Some("payload"));
        assert_eq!(guess("topics"), Some("topic"));
        assert_eq!(guess("ttl_second"), Some("ttl_seconds"));
        assert_eq!(guess("colour"), None);
        assert_eq!(guess(""), None);
        assert_eq!(guess(&"x".repeat(100_000)), None);
        assert_eq!(edits(&fold("kitten"), &fold("sitting")), 3);
    }
}
