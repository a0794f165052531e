//! Cursors of lists: opaque to callers, and of one list each.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// A cursor of the list `list` that goes on behind `place`.
pub(super) fn write(list: &str, place: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{list}:{place}"))
}

/// Where a cursor of the list `list` goes on; `None` if it is none of this list.
pub(super) fn read(list: &str, cursor: &str) -> Option<String> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    Some(text.strip_prefix(list)?.strip_prefix(':')?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_leads_back_to_its_place_in_its_own_list_only() {
        let cursor = write("devices", "42");
        assert_eq!(read("devices", &cursor).as_deref(), Some("42"));
        assert_eq!(read("notifications", &cursor), None);
        for garbage in ["", "42", "%%%", "ZGV2aWNlcw"] {
            assert_eq!(read("devices", garbage), None, "{garbage:?}");
        }
    }
}
