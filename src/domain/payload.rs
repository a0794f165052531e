//! Apple's JSON, kept and sent byte for byte.
//!
//! Promises: the bytes that the caller wrote are the bytes that APNs gets; they are one UTF-8 JSON object without a
//! repeated key, no longer than the push type allows. APNs itself reads little of it and the device ignores what it
//! does not understand, so a `200` proves nothing about the content: [`Payload::parse`] refuses what would not be shown
//! or not be handled, and tells what is suspicious. Keys, types and ranges are those of Apple's "Generating a remote
//! notification" and "Starting and updating Live Activities with ActivityKit push notifications".

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashSet},
    fmt,
};

use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};

use super::{push::PushType, spelling};

/// A checked payload. Cloning shares the bytes.
#[derive(Clone)]
pub struct Payload {
    bytes: Bytes,
    /// Whether it shows something to read, if it was looked into.
    shows_alert: Option<bool>,
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Payload {}

/// One thing that is wrong or suspicious in a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A JSON pointer that begins with `/payload`.
    pub pointer: String,
    /// A stable word.
    pub code: &'static str,
    /// What is wrong, and what to do.
    pub detail: String,
}

impl Payload {
    /// A payload that was checked before and is read back from where it was kept.
    #[must_use]
    pub const fn from_stored(bytes: Bytes) -> Self {
        Self { bytes, shows_alert: None }
    }

    /// The bytes for APNs.
    #[must_use]
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Checks the text of a JSON value as a payload of this type. With it come the things that are suspicious.
    ///
    /// # Errors
    /// All reasons for which APNs or the device would refuse it.
    pub fn parse(raw: &str, push_type: PushType) -> Result<(Self, Vec<Finding>), Vec<Finding>> {
        let mut lint = Lint::default();
        let max = push_type.max_payload_bytes();
        if raw.len() > max {
            lint.error(
                ROOT,
                "too_large",
                format!(
                    "The payload has {} bytes; APNs takes at most {max} for push type `{push_type}`. White space counts: it is sent as it is written.",
                    raw.len()
                ),
            );
        }
        let mut shows_alert = None;
        // What is many times too large is not looked into.
        if raw.len() <= LOOKED_INTO_BYTES {
            match serde_json::from_str::<Node<'_>>(raw) {
                Ok(node) => {
                    lint.payload(&node, push_type);
                    shows_alert = Some(node.shows_alert());
                }
                Err(error) => lint.error(ROOT, "invalid", format!("The payload cannot be read: {error}.")),
            }
        }
        if lint.errors.is_empty() {
            Ok((Self { bytes: Bytes::copy_from_slice(raw.as_bytes()), shows_alert }, lint.warnings))
        } else {
            Err(lint.errors)
        }
    }

    /// Whether it shows something to read: an `alert` with a text.
    #[must_use]
    pub fn shows_alert(&self) -> bool {
        let look = || serde_json::from_slice::<Node<'_>>(&self.bytes).is_ok_and(|node| node.shows_alert());
        self.shows_alert.unwrap_or_else(look)
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.bytes.len())
    }
}

const ROOT: &str = "/payload";
const APS: &str = "/payload/aps";
const ALERT: &str = "/payload/aps/alert";
const LOOKED_INTO_BYTES: usize = 64 * 1024;

/// So many keys are compared with each other sooner than put into a set.
const FEW_KEYS: usize = 16;

/// At most this many of each kind are listed.
const MAX_FINDINGS: usize = 50;

/// The texts by which an alert shows itself.
const ALERT_TEXTS: [&str; 6] = ["title", "subtitle", "body", "title-loc-key", "subtitle-loc-key", "loc-key"];

/// Keys of `aps` and the push types they are for, in words.
const APS_KEYS: [(&str, &[PushType]); 24] = [
    ("alert", &[PushType::Alert, PushType::LiveActivity]),
    ("badge", &[PushType::Alert]),
    ("sound", &[PushType::Alert]),
    ("thread-id", &[PushType::Alert]),
    ("category", &[PushType::Alert]),
    ("content-available", &[PushType::Background, PushType::Alert]),
    ("mutable-content", &[PushType::Alert]),
    ("target-content-id", &[PushType::Alert]),
    ("interruption-level", &[PushType::Alert]),
    ("relevance-score", &[PushType::Alert, PushType::LiveActivity]),
    ("filter-criteria", &[PushType::Alert]),
    ("url-args", &[PushType::Alert]),
    ("content-changed", &[PushType::Widgets, PushType::Controls]),
    ("timestamp", &[PushType::LiveActivity]),
    ("event", &[PushType::LiveActivity]),
    ("content-state", &[PushType::LiveActivity]),
    ("stale-date", &[PushType::LiveActivity]),
    ("dismissal-date", &[PushType::LiveActivity]),
    ("attributes-type", &[PushType::LiveActivity]),
    ("attributes", &[PushType::LiveActivity]),
    ("input-push-token", &[PushType::LiveActivity]),
    ("input-push-channel", &[PushType::LiveActivity]),
    // Not in Apple's table of payload keys; seen with iOS 12 to 14.
    ("summary-arg", &[]),
    ("summary-arg-count", &[]),
];

/// Keys of `alert`, and whether each is still in use.
const ALERT_KEYS: [(&str, bool); 14] = [
    ("title", true),
    ("subtitle", true),
    ("body", true),
    ("title-loc-key", true),
    ("subtitle-loc-key", true),
    ("loc-key", true),
    ("title-loc-args", true),
    ("subtitle-loc-args", true),
    ("loc-args", true),
    ("launch-image", true),
    ("action-loc-key", false),
    ("action", false),
    ("summary-arg", false),
    ("summary-arg-count", false),
];

/// Where keys belong that are often written beside `aps` or into the wrong object.
const MISPLACED: [(&str, &str); 12] = [
    ("alert", "/payload/aps/alert"),
    ("title", "/payload/aps/alert/title"),
    ("subtitle", "/payload/aps/alert/subtitle"),
    ("body", "/payload/aps/alert/body"),
    ("message", "/payload/aps/alert/body"),
    ("text", "/payload/aps/alert/body"),
    ("sound", "/payload/aps/sound"),
    ("badge", "/payload/aps/badge"),
    ("notification", "/payload/aps/alert"),
    ("content-available", "/payload/aps/content-available"),
    ("mutable-content", "/payload/aps/mutable-content"),
    ("thread-id", "/payload/aps/thread-id"),
];

/// A string of a JSON value: where it is written without an escape, the text itself.
struct Text<'a>(Cow<'a, str>);

impl Text<'_> {
    fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::ops::Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<Text<'_>> for &str {
    fn eq(&self, other: &Text<'_>) -> bool {
        *self == other.as_str()
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(value)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(value.to_owned())))
            }
        }
        deserializer.deserialize_str(Reader)
    }
}

/// A JSON value that keeps repeated keys, so that they can be told.
enum Node<'a> {
    Null,
    Bool(bool),
    Number(f64),
    String(Text<'a>),
    Array(Vec<Node<'a>>),
    Object(Vec<(Text<'a>, Node<'a>)>),
}

impl Node<'_> {
    fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Object(entries) => entries.iter().find(|(name, _)| name.as_str() == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// Whether a payload has an `alert` with a text.
    fn shows_alert(&self) -> bool {
        self.get("aps").and_then(|aps| aps.get("alert")).is_some_and(|alert| match alert {
            Self::String(text) => !text.is_empty(),
            Self::Object(_) => {
                ALERT_TEXTS.iter().any(|key| matches!(alert.get(key), Some(Self::String(text)) if !text.is_empty()))
            }
            _ => false,
        })
    }

    const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
            Self::Object(_) => "an object",
        }
    }

    #[expect(clippy::float_cmp, reason = "whole numbers that a person wrote are exact")]
    fn is_number(&self, wanted: f64) -> bool {
        matches!(self, Self::Number(number) if *number == wanted)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Node<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Node<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_unit<E>(self) -> Result<Node<'de>, E> {
                Ok(Node::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Node<'de>, E> {
                Ok(Node::Bool(value))
            }

            #[expect(clippy::cast_precision_loss, reason = "only small numbers are compared")]
            fn visit_i64<E>(self, value: i64) -> Result<Node<'de>, E> {
                Ok(Node::Number(value as f64))
            }

            #[expect(clippy::cast_precision_loss, reason = "only small numbers are compared")]
            fn visit_u64<E>(self, value: u64) -> Result<Node<'de>, E> {
                Ok(Node::Number(value as f64))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Node<'de>, E> {
                Ok(Node::Number(value))
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Node<'de>, E> {
                Ok(Node::String(Text(Cow::Borrowed(value))))
            }

            fn visit_str<E>(self, value: &str) -> Result<Node<'de>, E> {
                Ok(Node::String(Text(Cow::Owned(value.to_owned()))))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node<'de>, A::Error> {
                let mut array = Vec::new();
                while let Some(item) = items.next_element()? {
                    array.push(item);
                }
                Ok(Node::Array(array))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node<'de>, A::Error> {
                let mut object = Vec::new();
                while let Some(entry) = entries.next_entry()? {
                    object.push(entry);
                }
                Ok(Node::Object(object))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// A JSON pointer to a member, from the pointer to what it is in.
pub(crate) fn member(of: &str, key: &str) -> String {
    if key.contains(['~', '/']) {
        return format!("{of}/{}", key.replace('~', "~0").replace('/', "~1"));
    }
    [of, "/", key].concat()
}

/// A name as it may be repeated in a message.
fn shown(key: &str) -> String {
    key.chars().take(64).collect()
}

#[derive(Default)]
struct Lint {
    errors: Vec<Finding>,
    warnings: Vec<Finding>,
}

impl Lint {
    fn error(&mut self, pointer: &str, code: &'static str, detail: impl Into<String>) {
        if self.errors.len() < MAX_FINDINGS {
            self.errors.push(Finding { pointer: pointer.to_owned(), code, detail: detail.into() });
        }
    }

    fn warning(&mut self, pointer: &str, code: &'static str, detail: impl Into<String>) {
        if self.warnings.len() < MAX_FINDINGS {
            self.warnings.push(Finding { pointer: pointer.to_owned(), code, detail: detail.into() });
        }
    }

    fn payload(&mut self, node: &Node<'_>, push_type: PushType) {
        self.duplicates(node, ROOT);
        let Node::Object(entries) = node else {
            self.error(ROOT, "type", format!("The payload must be an object with `aps` inside, not {}.", node.kind()));
            return;
        };
        let aps = node.get("aps");
        match push_type {
            PushType::FileProvider => {
                self.no_aps(aps, push_type);
                if !matches!(node.get("container-identifier"), Some(Node::String(_))) {
                    self.warning(
                        &member(ROOT, "container-identifier"),
                        "required",
                        "A file provider push names the container that changed in `container-identifier`.",
                    );
                }
                return;
            }
            PushType::Mdm => {
                self.no_aps(aps, push_type);
                if !matches!(node.get("mdm"), Some(Node::String(_))) {
                    self.error(&member(ROOT, "mdm"), "required", "An MDM push holds the device's PushMagic in `mdm`.");
                }
                return;
            }
            _ => {}
        }
        let aps = match aps {
            Some(aps @ Node::Object(_)) => Some(aps),
            Some(other) => {
                self.error(APS, "type", format!("`aps` must be an object, not {}.", other.kind()));
                return;
            }
            None => None,
        };
        match push_type {
            PushType::Alert => self.alert_push(aps),
            PushType::Background => self.background_push(aps),
            PushType::LiveActivity => self.live_activity_push(aps),
            PushType::Widgets | PushType::Controls => self.content_changed_push(aps, push_type),
            // Apple leaves the content of these to the app.
            PushType::Voip
            | PushType::Complication
            | PushType::Location
            | PushType::PushToTalk
            | PushType::FileProvider
            | PushType::Mdm => {}
        }
        if let Some(aps) = aps {
            self.keys_of_aps(aps, push_type);
        }
        for (key, _) in entries {
            let belongs = MISPLACED.iter().find(|(name, _)| folded(name).eq(folded(key))).map(|(_, place)| *place);
            if let Some(place) = belongs.filter(|_| matches!(push_type, PushType::Alert | PushType::LiveActivity)) {
                self.warning(
                    &member(ROOT, key),
                    "misplaced",
                    format!(
                        "Beside `aps` this is the app's own data and is not shown; what is to be shown stands at {place}."
                    ),
                );
            }
        }
    }

    fn duplicates(&mut self, node: &Node<'_>, pointer: &str) {
        match node {
            Node::Object(entries) => {
                let (mut seen, mut told) = (HashSet::new(), BTreeSet::new());
                for (index, (key, value)) in entries.iter().enumerate() {
                    let stood_before = if entries.len() <= FEW_KEYS {
                        entries.iter().take(index).any(|(before, _)| before.as_str() == key.as_str())
                    } else {
                        !seen.insert(key.as_str())
                    };
                    if stood_before && told.insert(key.as_str()) {
                        self.error(
                            &member(pointer, key),
                            "duplicate_key",
                            "This key stands here more than once: which one would count is anybody's guess.",
                        );
                    }
                    if matches!(value, Node::Object(_) | Node::Array(_)) {
                        self.duplicates(value, &member(pointer, key));
                    }
                }
            }
            Node::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    if matches!(item, Node::Object(_) | Node::Array(_)) {
                        self.duplicates(item, &format!("{pointer}/{index}"));
                    }
                }
            }
            _ => {}
        }
    }

    fn no_aps(&mut self, aps: Option<&Node<'_>>, push_type: PushType) {
        if aps.is_some() {
            self.warning(APS, "ignored", format!("A push of type `{push_type}` has no `aps`: it is ignored."));
        }
    }

    fn keys_of_aps(&mut self, aps: &Node<'_>, push_type: PushType) {
        let Node::Object(entries) = aps else { return };
        let known = || APS_KEYS.iter().map(|(name, _)| *name);
        for (key, value) in entries {
            let pointer = member(APS, key);
            match APS_KEYS.iter().find(|(name, _)| name == key) {
                Some(("url-args", _)) => {
                    self.warning(&pointer, "obsolete", "`url-args` is for Safari's old website pushes only.");
                }
                Some((_, types)) if !types.is_empty() && !types.contains(&push_type) => {
                    let told = self.errors.iter().any(|finding| finding.pointer == pointer);
                    if !told {
                        let types: Vec<&str> = types.iter().map(|t| t.as_str()).collect();
                        self.warning(
                            &pointer,
                            "wrong_push_type",
                            format!(
                                "`{key}` is for push type {}; in one of type `{push_type}` it is ignored.",
                                types.join(" or ")
                            ),
                        );
                    }
                }
                Some((_, [])) => {
                    self.warning(&pointer, "obsolete", format!("`{key}` is no key of `aps`: it is ignored."));
                }
                Some(_) if matches!(value, Node::Null) => {
                    self.warning(&pointer, "null", "Null means nothing here: leave the key out.");
                }
                Some(_) => {}
                None => {
                    let misplaced = MISPLACED.iter().find(|(name, _)| name == key).map(|(_, place)| *place);
                    let advice = match (misplaced, spelling::closest(key, known())) {
                        (Some(place), _) => format!("it belongs to {place}"),
                        (None, Some(name)) => format!("did you mean `{name}`?"),
                        (None, None) => "the app's own keys stand beside `aps`, not inside".to_owned(),
                    };
                    self.warning(
                        &pointer,
                        "unknown_key",
                        format!("`{}` is no key of `aps` and is ignored: {advice}.", shown(key)),
                    );
                }
            }
        }
    }

    fn alert_push(&mut self, aps: Option<&Node<'_>>) {
        let Some(aps) = aps else {
            self.error(
                APS,
                "required",
                "A push of type `alert` shows what stands in `aps`: {\"aps\": {\"alert\": {\"title\": …, \"body\": …}}}.",
            );
            return;
        };
        let alert = present(aps.get("alert"));
        let texts = alert.map_or(0, |alert| self.alert(alert, false));
        let (badge, sound) = (present(aps.get("badge")), present(aps.get("sound")));
        if let Some(badge) = badge {
            match badge {
                Node::Number(number) if *number >= 0.0 && number.fract() == 0.0 => {}
                other => self.error(
                    &member(APS, "badge"),
                    "type",
                    format!("`badge` must be a whole number, 0 or more, not {}; 0 removes it.", described(other)),
                ),
            }
        }
        if let Some(sound) = sound {
            self.sound(sound);
        }
        if texts == 0 && badge.is_none() && sound.is_none() {
            let silent = present(aps.get("content-available")).is_some();
            let hint =
                if silent { " For a push that only wakes the app, set `push_type` to `background`." } else { "" };
            self.error(
                ALERT,
                "nothing_to_show",
                format!("A push of type `alert` needs a text, a `badge` or a `sound`.{hint}"),
            );
        }
        for key in ["thread-id", "category", "target-content-id", "filter-criteria"] {
            self.string(aps, key);
        }
        self.one(aps, "content-available");
        self.one(aps, "mutable-content");
        if present(aps.get("mutable-content")).is_some() && texts == 0 {
            self.warning(
                &member(APS, "mutable-content"),
                "ignored",
                "The notification service extension runs only for a push whose `alert` has a title, a subtitle or a body.",
            );
        }
        match present(aps.get("interruption-level")) {
            None => {}
            Some(Node::String(level))
                if matches!(level.as_str(), "passive" | "active" | "time-sensitive" | "critical") => {}
            Some(_) => self.error(
                &member(APS, "interruption-level"),
                "invalid",
                "`interruption-level` must be `passive`, `active`, `time-sensitive` or `critical`.",
            ),
        }
        match present(aps.get("relevance-score")) {
            None => {}
            Some(Node::Number(score)) if (0.0..=1.0).contains(score) => {}
            Some(_) => self.error(
                &member(APS, "relevance-score"),
                "invalid",
                "`relevance-score` of an alert must be a number from 0 to 1.",
            ),
        }
    }

    /// Checks an `alert` and says how many texts it shows.
    fn alert(&mut self, alert: &Node<'_>, live_activity: bool) -> usize {
        let entries = match alert {
            Node::String(text) if text.is_empty() => {
                self.warning(ALERT, "empty", "An empty `alert` shows nothing.");
                return 0;
            }
            Node::String(_) => return 1,
            Node::Object(entries) => entries,
            other => {
                self.error(ALERT, "type", format!("`alert` must be an object or a string, not {}.", other.kind()));
                // One fault is told once.
                return 1;
            }
        };
        let mut texts = 0;
        for (key, value) in entries {
            let pointer = member(ALERT, key);
            match (key.as_str(), value) {
                (_, Node::Null) => {
                    self.warning(&pointer, "null", "Null means nothing here: leave the key out.");
                }
                ("title" | "body", Node::Object(_)) if live_activity => texts += 1,
                ("sound", Node::String(_)) if live_activity => {}
                ("sound" | "badge", _) => {
                    self.warning(&pointer, "misplaced", format!("`{key}` belongs to {}.", member(APS, key)));
                }
                ("title-loc-args" | "subtitle-loc-args" | "loc-args", Node::Array(items)) => {
                    for (index, item) in items.iter().enumerate() {
                        if !matches!(item, Node::String(_)) {
                            self.error(
                                &format!("{pointer}/{index}"),
                                "type",
                                format!("`{key}` holds strings only, not {}: write numbers in quotes.", item.kind()),
                            );
                        }
                    }
                    let wanted = key.replace("args", "key");
                    if alert.get(&wanted).is_none() {
                        self.warning(
                            &pointer,
                            "ignored",
                            format!("`{key}` fills in the text of `{wanted}`, which is missing."),
                        );
                    }
                }
                ("title-loc-args" | "subtitle-loc-args" | "loc-args", other) => {
                    self.error(&pointer, "type", format!("`{key}` must be an array of strings, not {}.", other.kind()));
                }
                (name, value) => match ALERT_KEYS.iter().find(|(known, _)| *known == name) {
                    Some((_, false)) => {
                        self.warning(&pointer, "obsolete", format!("`{key}` is ignored by current systems."));
                    }
                    Some(_) => match value {
                        Node::String(text) => {
                            texts += usize::from(!text.is_empty() && ALERT_TEXTS.contains(&name));
                        }
                        other => {
                            self.error(
                                &pointer,
                                "type",
                                format!("`{key}` must be a string, not {}.", described(other)),
                            );
                            // One fault is told once.
                            texts += 1;
                        }
                    },
                    None => {
                        let known = ALERT_KEYS.iter().filter(|(_, current)| *current).map(|(known, _)| *known);
                        let advice = spelling::closest(key, known)
                            .map_or_else(String::new, |name| format!(": did you mean `{name}`?"));
                        self.warning(
                            &pointer,
                            "unknown_key",
                            format!("`{}` is no key of `alert` and is ignored{advice}.", shown(key)),
                        );
                    }
                },
            }
        }
        texts
    }

    fn sound(&mut self, sound: &Node<'_>) {
        let pointer = member(APS, "sound");
        match sound {
            Node::String(_) => {}
            Node::Object(_) => {
                match sound.get("name") {
                    Some(Node::String(_)) => {}
                    _ => self.error(
                        &member(&pointer, "name"),
                        "required",
                        "A `sound` object needs a `name`: a file of the app, or `default`.",
                    ),
                }
                match sound.get("critical") {
                    Some(critical) if critical.is_number(1.0) => {}
                    None => self.warning(
                        &member(&pointer, "critical"),
                        "required",
                        "A `sound` object is for critical alerts: set `critical` to 1, or give the name as a string.",
                    ),
                    Some(critical) if critical.is_number(0.0) => {}
                    Some(_) => {
                        self.error(&member(&pointer, "critical"), "type", "`critical` must be the number 1 or 0.");
                    }
                }
                match sound.get("volume") {
                    None => {}
                    Some(Node::Number(volume)) if (0.0..=1.0).contains(volume) => {}
                    Some(_) => {
                        self.error(&member(&pointer, "volume"), "invalid", "`volume` must be a number from 0 to 1.");
                    }
                }
            }
            other => self.error(
                &pointer,
                "type",
                format!("`sound` must be a string or, for critical alerts, an object, not {}.", other.kind()),
            ),
        }
    }

    fn background_push(&mut self, aps: Option<&Node<'_>>) {
        let pointer = member(APS, "content-available");
        match aps.and_then(|aps| present(aps.get("content-available"))) {
            Some(value) if value.is_number(1.0) => {}
            Some(value) => self.error(
                &pointer,
                "type",
                format!("`content-available` must be the number 1, not {}.", described(value)),
            ),
            None => self.error(
                &pointer,
                "required",
                "A push of type `background` needs {\"aps\": {\"content-available\": 1}}.",
            ),
        }
        for key in ["alert", "badge", "sound"] {
            if aps.and_then(|aps| present(aps.get(key))).is_some() {
                self.error(
                    &member(APS, key),
                    "wrong_push_type",
                    format!(
                        "A push of type `background` shows nothing, so it may not have `{key}`: devices drop it. Set `push_type` to `alert`, or leave `{key}` out."
                    ),
                );
            }
        }
    }

    fn content_changed_push(&mut self, aps: Option<&Node<'_>>, push_type: PushType) {
        let pointer = member(APS, "content-changed");
        match aps.and_then(|aps| present(aps.get("content-changed"))) {
            Some(Node::Bool(true)) => {}
            Some(value) => self.error(
                &pointer,
                "type",
                format!("`content-changed` must be the boolean true, not {}.", described(value)),
            ),
            None => self.error(
                &pointer,
                "required",
                format!("A push of type `{push_type}` needs {{\"aps\": {{\"content-changed\": true}}}}."),
            ),
        }
    }

    fn live_activity_push(&mut self, aps: Option<&Node<'_>>) {
        let Some(aps) = aps else {
            self.error(APS, "required", "A push of type `liveactivity` needs `aps` with `timestamp` and `event`.");
            return;
        };
        if present(aps.get("timestamp")).is_none() {
            self.error(
                &member(APS, "timestamp"),
                "required",
                "`timestamp` is required: when this was sent, in seconds since 1970. The device shows the newest.",
            );
        }
        for key in ["timestamp", "stale-date", "dismissal-date"] {
            self.seconds(aps, key);
        }
        let event = match present(aps.get("event")) {
            Some(Node::String(event)) if matches!(event.as_str(), "start" | "update" | "end") => event.as_str(),
            Some(_) => {
                self.error(&member(APS, "event"), "invalid", "`event` must be `start`, `update` or `end`.");
                return;
            }
            None => {
                self.error(&member(APS, "event"), "required", "`event` is required: `start`, `update` or `end`.");
                return;
            }
        };
        match present(aps.get("content-state")) {
            Some(Node::Object(_)) => {}
            Some(other) => self.error(
                &member(APS, "content-state"),
                "type",
                format!(
                    "`content-state` must be an object, as the app's `ContentState` is coded, not {}.",
                    other.kind()
                ),
            ),
            None if event == "end" => self.warning(
                &member(APS, "content-state"),
                "required",
                "Without a `content-state` the activity ends with what it showed last.",
            ),
            None => self.error(
                &member(APS, "content-state"),
                "required",
                format!("`{event}` needs a `content-state`, as the app's `ContentState` is coded."),
            ),
        }
        let starts = event == "start";
        match present(aps.get("alert")) {
            Some(alert) if self.alert(alert, true) == 0 && starts => {
                self.error(ALERT, "nothing_to_show", "`start` needs an `alert` with a title and a body.");
            }
            None if starts => {
                self.error(ALERT, "required", "`start` needs an `alert` with a title and a body.");
            }
            Some(_) | None => {}
        }
        self.start_of_live_activity(aps, starts);
        if event != "end" && present(aps.get("dismissal-date")).is_some() {
            self.warning(
                &member(APS, "dismissal-date"),
                "ignored",
                "`dismissal-date` matters only when `event` is `end`.",
            );
        }
        if !matches!(present(aps.get("relevance-score")), None | Some(Node::Number(_))) {
            self.error(&member(APS, "relevance-score"), "type", "`relevance-score` must be a number.");
        }
    }

    /// What belongs to the start alone.
    fn start_of_live_activity(&mut self, aps: &Node<'_>, starts: bool) {
        if starts {
            if !matches!(present(aps.get("attributes-type")), Some(Node::String(_))) {
                self.error(
                    &member(APS, "attributes-type"),
                    "required",
                    "`start` needs `attributes-type`: the name of the app's `ActivityAttributes` type, a string.",
                );
            }
            if !matches!(present(aps.get("attributes")), Some(Node::Object(_))) {
                self.error(
                    &member(APS, "attributes"),
                    "required",
                    "`start` needs `attributes`: the activity's static data, an object.",
                );
            }
            self.one(aps, "input-push-token");
            self.string(aps, "input-push-channel");
            if present(aps.get("input-push-token")).is_some() && present(aps.get("input-push-channel")).is_some() {
                self.error(
                    &member(APS, "input-push-channel"),
                    "conflict",
                    "`input-push-token` and `input-push-channel` exclude each other: an activity is updated by token or by channel.",
                );
            }
        } else {
            for key in ["attributes-type", "attributes", "input-push-token", "input-push-channel"] {
                if present(aps.get(key)).is_some() {
                    self.warning(
                        &member(APS, key),
                        "ignored",
                        format!("`{key}` matters only when `event` is `start`."),
                    );
                }
            }
        }
    }

    fn seconds(&mut self, aps: &Node<'_>, key: &str) {
        match present(aps.get(key)) {
            None => {}
            Some(Node::Number(number)) if *number > 100_000_000_000.0 => self.error(
                &member(APS, key),
                "milliseconds",
                format!("`{key}` must be in seconds since 1970; this looks like milliseconds."),
            ),
            Some(Node::Number(number)) if *number >= 0.0 => {}
            Some(other) => self.error(
                &member(APS, key),
                "type",
                format!("`{key}` must be a number, in seconds since 1970, not {}.", described(other)),
            ),
        }
    }

    fn string(&mut self, aps: &Node<'_>, key: &str) {
        if let Some(other) = present(aps.get(key)).filter(|value| !matches!(value, Node::String(_))) {
            self.error(&member(APS, key), "type", format!("`{key}` must be a string, not {}.", described(other)));
        }
    }

    /// A key that is the number 1 or absent. 0 is read as absent.
    fn one(&mut self, aps: &Node<'_>, key: &str) {
        match present(aps.get(key)) {
            None => {}
            Some(value) if value.is_number(1.0) => {}
            Some(value) if value.is_number(0.0) => {
                self.warning(&member(APS, key), "ignored", format!("Leave `{key}` out instead of setting it to 0."));
            }
            Some(value) => self.error(
                &member(APS, key),
                "type",
                format!("`{key}` must be the number 1, not {}.", described(value)),
            ),
        }
    }
}

/// Null is as good as absent; it is warned of elsewhere.
fn present<'n, 'a>(node: Option<&'n Node<'a>>) -> Option<&'n Node<'a>> {
    node.filter(|node| !matches!(node, Node::Null))
}

/// What a wrong value is, with the value where it is short and harmless.
fn described(node: &Node<'_>) -> String {
    match node {
        Node::Bool(value) => format!("the boolean {value}"),
        Node::Number(number) => format!("the number {number}"),
        other => other.kind().to_owned(),
    }
}

/// A key as it is compared where case, underscores and hyphens do not matter.
fn folded(key: &str) -> impl Iterator<Item = u8> {
    key.bytes().filter(|byte| !matches!(byte, b'_' | b'-')).map(|byte| byte.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(raw: &str, push_type: PushType) -> Vec<(String, &'static str)> {
        match Payload::parse(raw, push_type) {
            Ok(_) => Vec::new(),
            Err(findings) => findings.into_iter().map(|f| (f.pointer, f.code)).collect(),
        }
    }

    fn warnings(raw: &str, push_type: PushType) -> Vec<(String, &'static str)> {
        Payload::parse(raw, push_type).unwrap().1.into_iter().map(|f| (f.pointer, f.code)).collect()
    }

    /// A push type, a payload, and the pointers and codes that it gets.
    type Case = (PushType, &'static str, &'static [(&'static str, &'static str)]);

    /// The examples of the protocol sheet, §5.6.
    const RIGHT: &[(PushType, &str)] = &[
        (
            PushType::Alert,
            r#"{"aps":{"alert":{"title":"Nouvelle livraison","body":"Commande 1042 : 2 Reine, 1 Calzone. 12 rue Oberkampf."},"sound":"default","badge":1,
  "thread-id":"tournee-7","category":"LIVRAISON","interruption-level":"time-sensitive"},"order_id":1042}"#,
        ),
        (
            PushType::Alert,
            r#"{"aps":{"alert":{"title":"Your pizza is on its way","subtitle":"Order 1042","body":"Léa leaves the shop now, about 14 minutes."},
  "sound":"four.caf","relevance-score":0.8,"target-content-id":"order-1042","mutable-content":1},"photo":"https://cdn.example/1042.jpg"}"#,
        ),
        (
            PushType::Alert,
            r#"{"aps":{"alert":{"title-loc-key":"ORDER_READY_TITLE","loc-key":"ORDER_READY_BODY","loc-args":["1042","Margherita"]}},"order_id":1042}"#,
        ),
        (PushType::Background, r#"{"aps":{"content-available":1},"menu_version":318}"#),
        (
            PushType::Alert,
            r#"{"aps":{"alert":{"title":"Alarme four","body":"Four 2 au-dessus de 420 °C"},"sound":{"critical":1,"name":"default","volume":1.0},"interruption-level":"critical"}}"#,
        ),
        (
            PushType::LiveActivity,
            r#"{"aps":{"timestamp":1795372500,"event":"start","attributes-type":"PizzaOrderAttributes","attributes":{"order":1042,"shop":"Bastille"},
  "content-state":{"step":"oven","eta":1795374300},"alert":{"title":"Commande 1042","body":"Au four !","sound":"default"},"input-push-token":1}}"#,
        ),
        (
            PushType::LiveActivity,
            r#"{"aps":{"timestamp":1795373100,"event":"update","content-state":{"step":"delivery","eta":1795374000},"stale-date":1795374900,"relevance-score":75}}"#,
        ),
        (
            PushType::LiveActivity,
            r#"{"aps":{"timestamp":1795374060,"event":"end","content-state":{"step":"delivered","eta":1795374060},"dismissal-date":1795374660}}"#,
        ),
        (PushType::Widgets, r#"{"aps":{"content-changed":true}}"#),
        (PushType::Controls, r#"{"aps":{"content-changed":true}}"#),
        (
            PushType::FileProvider,
            r#"{"container-identifier":"NSFileProviderWorkingSetContainerItemIdentifier","domain":"fr.ocpizza.docs"}"#,
        ),
        (PushType::Mdm, r#"{"mdm":"6E0A0000-PushMagic"}"#),
        (PushType::Voip, r#"{"aps":{},"callUUID":"8c1b","handle":"+33 1 23 45 67 89"}"#),
        (PushType::PushToTalk, r#"{"aps":{},"activeSpeaker":"Cuisine"}"#),
        (PushType::Location, r#"{"aps":{},"query":"rider-42"}"#),
        (PushType::Complication, "{}"),
        (PushType::Alert, r#"{"aps":{"alert":"Commande 1042"}}"#),
        (PushType::Alert, r#"{"aps":{"badge":0}}"#),
        (PushType::Alert, r#"{"aps":{"sound":"default","content-available":1}}"#),
        (
            PushType::LiveActivity,
            r#"{"aps":{"timestamp":1795373100,"event":"update","content-state":{},"alert":{"title":{"loc-key":"T","loc-args":["1"]},"body":{"loc-key":"B"},"sound":"default"}}}"#,
        ),
    ];

    #[test]
    fn apples_own_shapes_pass_without_a_word_and_unchanged() {
        for (push_type, raw) in RIGHT {
            let (payload, warnings) = Payload::parse(raw, *push_type).unwrap_or_else(|e| panic!("{raw}: {e:?}"));
            assert_eq!(payload.bytes().as_ref(), raw.as_bytes());
            assert_eq!(warnings, [], "{raw}");
        }
    }

    #[test]
    fn what_the_device_would_ignore_is_refused_with_a_pointer() {
        use PushType::{Alert, Background, Controls, LiveActivity, Mdm, Widgets};
        let wrong: &[Case] = &[
            (Alert, "[]", &[("/payload", "type")]),
            (Alert, "\"aps\"", &[("/payload", "type")]),
            (Alert, "{}", &[("/payload/aps", "required")]),
            (Alert, r#"{"aps":null}"#, &[("/payload/aps", "type")]),
            (Alert, r#"{"aps":{}}"#, &[("/payload/aps/alert", "nothing_to_show")]),
            (Alert, r#"{"aps":{"alert":{}}}"#, &[("/payload/aps/alert", "nothing_to_show")]),
            (Alert, r#"{"aps":{"alert":""}}"#, &[("/payload/aps/alert", "nothing_to_show")]),
            (Alert, r#"{"aps":{"alert":{"title":null}}}"#, &[("/payload/aps/alert", "nothing_to_show")]),
            (Alert, r#"{"aps":{"content-available":1}}"#, &[("/payload/aps/alert", "nothing_to_show")]),
            (Alert, r#"{"aps":{"alert":7}}"#, &[("/payload/aps/alert", "type")]),
            (Alert, r#"{"aps":{"alert":{"title":7}}}"#, &[("/payload/aps/alert/title", "type")]),
            (
                Alert,
                r#"{"aps":{"alert":{"loc-key":"A","loc-args":["a",1042]}}}"#,
                &[("/payload/aps/alert/loc-args/1", "type")],
            ),
            (Alert, r#"{"aps":{"alert":{"loc-key":"A","loc-args":"a"}}}"#, &[("/payload/aps/alert/loc-args", "type")]),
            (Alert, r#"{"aps":{"badge":"1"}}"#, &[("/payload/aps/badge", "type")]),
            (Alert, r#"{"aps":{"badge":-1}}"#, &[("/payload/aps/badge", "type")]),
            (Alert, r#"{"aps":{"badge":1.5}}"#, &[("/payload/aps/badge", "type")]),
            (Alert, r#"{"aps":{"sound":1}}"#, &[("/payload/aps/sound", "type")]),
            (
                Alert,
                r#"{"aps":{"sound":{"critical":true,"volume":2}}}"#,
                &[
                    ("/payload/aps/sound/name", "required"),
                    ("/payload/aps/sound/critical", "type"),
                    ("/payload/aps/sound/volume", "invalid"),
                ],
            ),
            (
                Alert,
                r#"{"aps":{"alert":"a","mutable-content":true,"content-available":"1"}}"#,
                &[("/payload/aps/content-available", "type"), ("/payload/aps/mutable-content", "type")],
            ),
            (
                Alert,
                r#"{"aps":{"alert":"a","thread-id":7,"interruption-level":"urgent","relevance-score":75}}"#,
                &[
                    ("/payload/aps/thread-id", "type"),
                    ("/payload/aps/interruption-level", "invalid"),
                    ("/payload/aps/relevance-score", "invalid"),
                ],
            ),
            (Background, r#"{"aps":{}}"#, &[("/payload/aps/content-available", "required")]),
            (Background, r#"{"menu":1}"#, &[("/payload/aps/content-available", "required")]),
            (Background, r#"{"aps":{"content-available":true}}"#, &[("/payload/aps/content-available", "type")]),
            (
                Background,
                r#"{"aps":{"content-available":1,"alert":"a","badge":1,"sound":"x"}}"#,
                &[
                    ("/payload/aps/alert", "wrong_push_type"),
                    ("/payload/aps/badge", "wrong_push_type"),
                    ("/payload/aps/sound", "wrong_push_type"),
                ],
            ),
            (Widgets, r#"{"aps":{"content-changed":1}}"#, &[("/payload/aps/content-changed", "type")]),
            (Controls, r#"{"aps":{}}"#, &[("/payload/aps/content-changed", "required")]),
            (Mdm, r#"{"aps":{}}"#, &[("/payload/mdm", "required")]),
            (
                LiveActivity,
                r#"{"aps":{}}"#,
                &[("/payload/aps/timestamp", "required"), ("/payload/aps/event", "required")],
            ),
            (
                LiveActivity,
                r#"{"aps":{"timestamp":1795372500000,"event":"update","content-state":{}}}"#,
                &[("/payload/aps/timestamp", "milliseconds")],
            ),
            (LiveActivity, r#"{"aps":{"timestamp":1795372500,"event":"stop"}}"#, &[("/payload/aps/event", "invalid")]),
            (
                LiveActivity,
                r#"{"aps":{"timestamp":1795372500,"event":"update"}}"#,
                &[("/payload/aps/content-state", "required")],
            ),
            (
                LiveActivity,
                r#"{"aps":{"timestamp":1795372500,"event":"start","content-state":{},"input-push-token":1,"input-push-channel":"AA=="}}"#,
                &[
                    ("/payload/aps/alert", "required"),
                    ("/payload/aps/attributes-type", "required"),
                    ("/payload/aps/attributes", "required"),
                    ("/payload/aps/input-push-channel", "conflict"),
                ],
            ),
        ];
        for (push_type, raw, expected) in wrong {
            let expected: Vec<(String, &str)> = expected.iter().map(|(p, c)| ((*p).to_owned(), *c)).collect();
            assert_eq!(errors(raw, *push_type), expected, "{raw}");
        }
    }

    #[test]
    fn a_repeated_key_is_refused_wherever_it_stands() {
        assert_eq!(
            errors(r#"{"aps":{"alert":"a"},"a":[{"x":1,"x":2}],"a~/b":1,"a~/b":2,"aps":{}}"#, PushType::Alert),
            [
                ("/payload/a/0/x".to_owned(), "duplicate_key"),
                ("/payload/a~0~1b".to_owned(), "duplicate_key"),
                ("/payload/aps".to_owned(), "duplicate_key"),
            ]
        );
        assert_eq!(
            errors(r#"{"aps":{"alert":"a","\u0061lert":"b"}}"#, PushType::Alert),
            [("/payload/aps/alert".to_owned(), "duplicate_key")],
            "however it is written"
        );
    }

    #[test]
    fn the_size_counts_bytes_and_depends_on_the_push_type() {
        let of = |bytes: usize| {
            let frame = r#"{"aps":{"alert":"a"},"x":""}"#.len();
            format!(r#"{{"aps":{{"alert":"a"}},"x":"{}"}}"#, "y".repeat(bytes - frame))
        };
        assert_eq!(of(4096).len(), 4096);
        assert!(Payload::parse(&of(4096), PushType::Alert).is_ok());
        assert_eq!(errors(&of(4097), PushType::Alert), [("/payload".to_owned(), "too_large")]);
        assert!(Payload::parse(&of(5120), PushType::Voip).is_ok());
        assert_eq!(errors(&of(5121), PushType::Voip), [("/payload".to_owned(), "too_large")]);
        assert_eq!(errors(&of(10_000_000), PushType::Alert), [("/payload".to_owned(), "too_large")]);
    }

    #[test]
    fn hostile_json_is_refused_and_nothing_worse() {
        let deep = format!(r#"{{"aps":{{"alert":"a"}},"x":{}1{}}}"#, "[".repeat(500), "]".repeat(500));
        assert_eq!(errors(&deep, PushType::Alert), [("/payload".to_owned(), "invalid")]);
        assert_eq!(errors(r#"{"aps":{"alert":"\ud800"}}"#, PushType::Alert), [("/payload".to_owned(), "invalid")]);
        let many: String = (0..4000).map(|_| r#""x":1,"#).collect();
        let raw = format!(r#"{{{many}"aps":{{"alert":"a"}}}}"#);
        assert!(errors(&raw, PushType::Alert).len() <= MAX_FINDINGS);
    }

    #[test]
    fn the_suspicious_is_told_and_accepted() {
        use PushType::{Alert, LiveActivity, Voip};
        let cases: &[Case] = &[
            (
                Alert,
                r#"{"aps":{"alert":{"title":"a","boddy":"b","summary-arg":"c"}}}"#,
                &[("/payload/aps/alert/boddy", "unknown_key"), ("/payload/aps/alert/summary-arg", "obsolete")],
            ),
            (
                Alert,
                r#"{"aps":{"alert":"a","order":1,"title":"b","content-state":{}}}"#,
                &[
                    ("/payload/aps/order", "unknown_key"),
                    ("/payload/aps/title", "unknown_key"),
                    ("/payload/aps/content-state", "wrong_push_type"),
                ],
            ),
            (Alert, r#"{"aps":{"alert":"a"},"title":"b"}"#, &[("/payload/title", "misplaced")]),
            (Alert, r#"{"aps":{"alert":{"title":"a","sound":"b"}}}"#, &[("/payload/aps/alert/sound", "misplaced")]),
            (Alert, r#"{"aps":{"badge":1,"mutable-content":1}}"#, &[("/payload/aps/mutable-content", "ignored")]),
            (Alert, r#"{"aps":{"alert":"a","badge":null}}"#, &[("/payload/aps/badge", "null")]),
            (
                Alert,
                r#"{"aps":{"alert":{"body":"a","loc-args":["b"]}}}"#,
                &[("/payload/aps/alert/loc-args", "ignored")],
            ),
            (Voip, r#"{"aps":{"alert":"a"}}"#, &[("/payload/aps/alert", "wrong_push_type")]),
            (
                LiveActivity,
                r#"{"aps":{"timestamp":1,"event":"end","attributes":{},"sound":"x"}}"#,
                &[
                    ("/payload/aps/content-state", "required"),
                    ("/payload/aps/attributes", "ignored"),
                    ("/payload/aps/sound", "wrong_push_type"),
                ],
            ),
        ];
        for (push_type, raw, expected) in cases {
            let expected: Vec<(String, &str)> = expected.iter().map(|(p, c)| ((*p).to_owned(), *c)).collect();
            assert_eq!(warnings(raw, *push_type), expected, "{raw}");
        }
    }

    #[test]
    fn an_alert_is_visible_if_it_has_a_text() {
        let shows = |raw: &str| Payload::parse(raw, PushType::Alert).unwrap().0.shows_alert();
        assert!(shows(r#"{"aps":{"alert":"a"}}"#));
        assert!(shows(r#"{"aps":{"alert":{"loc-key":"a"}}}"#));
        assert!(!shows(r#"{"aps":{"badge":1}}"#));
        assert!(!shows(r#"{"aps":{"alert":{"launch-image":"x"},"sound":"default"}}"#));
    }
}
