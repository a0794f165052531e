//! Reads JSON objects and query strings so that all their faults are told at once, each with its place.
//!
//! Promises: a field is absent, null or a value; a repeated or unknown one is a fault, and a guessed name is told where
//! it lives; values are never repeated in a message, only names. Memory is bounded by the body and the caps given here:
//! a list keeps at most as many items as its cap, however long it is.

use std::{borrow::Cow, collections::HashSet, fmt, str::FromStr};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::problem::{Fault, Faults, Kind, Place, Problem};
use crate::domain::{device::Field, payload::member, spelling};

/// The most fields an object of the API may have; more are not kept.
const MAX_FIELDS: usize = 200;
/// The most parameters a query may have.
const MAX_PARAMETERS: usize = 50;

/// The JSON value that a body is.
///
/// # Errors
/// [`Kind::NotJson`] with the position, if it is anything else.
pub fn json(body: &[u8]) -> Result<&str, Problem> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Problem::new(Kind::NotJson, "The body is empty; a JSON object is needed."));
    }
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(Problem::new(Kind::NotJson, "The body begins with a byte order mark, which is not JSON."));
    }
    serde_json::from_slice::<&RawValue>(body)
        .map(RawValue::get)
        .map_err(|error| Problem::new(Kind::NotJson, format!("The body is not JSON: {error}.")))
}

/// One value and where it stands.
#[derive(Debug, Clone)]
pub struct Value<'a> {
    pointer: String,
    raw: &'a str,
}

impl<'a> Value<'a> {
    /// The text of a value that stands at `pointer`.
    #[must_use]
    pub fn new(raw: &'a str, pointer: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), raw }
    }

    /// Its text, byte for byte.
    #[must_use]
    pub const fn raw(&self) -> &'a str {
        self.raw
    }

    /// Its JSON pointer.
    #[must_use]
    pub fn pointer(&self) -> &str {
        &self.pointer
    }

    /// Whether it is null.
    #[must_use]
    pub fn is_null(&self) -> bool {
        self.raw == "null"
    }

    /// What it is, in words.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.raw.as_bytes().first() {
            Some(b'{') => "an object",
            Some(b'[') => "an array",
            Some(b'"') => "a string",
            Some(b't' | b'f') => "a boolean",
            Some(b'n') => "null",
            _ => "a number",
        }
    }

    /// A fault of this value.
    pub fn fault(&self, faults: &mut Faults, code: &'static str, detail: impl Into<Cow<'static, str>>) {
        faults.add(self.pointer.clone(), code, detail);
    }

    fn wrong_type(&self, faults: &mut Faults, wanted: &str) {
        self.fault(faults, "type", format!("Must be {wanted}, not {}.", self.kind()));
    }

    /// A string.
    pub fn string(&self, faults: &mut Faults) -> Option<Cow<'a, str>> {
        if !self.raw.starts_with('"') {
            self.wrong_type(faults, "a string");
            return None;
        }
        // Without an escape the text between the quotes is the string itself.
        let inner = self.raw.get(1..self.raw.len().saturating_sub(1)).unwrap_or_default();
        if !inner.contains('\\') {
            return Some(Cow::Borrowed(inner));
        }
        let text = serde_json::from_str::<String>(self.raw).ok();
        if text.is_none() {
            self.fault(faults, "invalid", "An escape in this string stands for no character.");
        }
        text.map(Cow::Owned)
    }

    /// A string that is one of ours.
    pub fn parse<T: FromStr>(&self, faults: &mut Faults) -> Option<T>
    where
        T::Err: fmt::Display,
    {
        let text = self.string(faults)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(faults, "invalid", sentence(&error.to_string()));
                None
            }
        }
    }

    /// A string out of a few.
    pub fn word<T: Copy>(&self, words: &[(&'static str, T)], faults: &mut Faults) -> Option<T> {
        let text = self.string(faults)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let all: Vec<String> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
            self.fault(faults, "invalid", format!("Must be {}.", all.join(" or ")));
        }
        found
    }

    /// A whole number.
    pub fn integer(&self, faults: &mut Faults) -> Option<i64> {
        match self.raw.parse() {
            Ok(number) if self.kind() == "a number" => Some(number),
            _ => {
                if self.kind() == "a number" {
                    let detail = "Must be a whole number of at most 19 digits, without a decimal point or an exponent.";
                    self.fault(faults, "type", detail);
                } else {
                    self.wrong_type(faults, "a whole number");
                }
                None
            }
        }
    }

    /// True or false.
    pub fn boolean(&self, faults: &mut Faults) -> Option<bool> {
        match self.raw {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                self.wrong_type(faults, "true or false");
                None
            }
        }
    }

    /// A list of at most `max` items.
    pub fn array(&self, max: usize, faults: &mut Faults) -> Option<Vec<Value<'a>>> {
        if !self.raw.starts_with('[') {
            self.wrong_type(faults, "an array");
            return None;
        }
        let mut deserializer = serde_json::Deserializer::from_str(self.raw);
        match deserializer.deserialize_seq(Items { max }) {
            Ok((items, count)) if count <= max => Some(
                items
                    .into_iter()
                    .enumerate()
                    .map(|(index, raw)| Value::new(raw.get(), format!("{}/{index}", self.pointer)))
                    .collect(),
            ),
            Ok((_, count)) => {
                self.fault(faults, "too_many", format!("At most {max} items are taken, these are {count}."));
                None
            }
            Err(_) => {
                self.wrong_type(faults, "an array");
                None
            }
        }
    }

    /// A list of at most `max` strings of ours, in their order, without repeats.
    pub fn list<T: FromStr + Eq + std::hash::Hash + Clone>(&self, max: usize, faults: &mut Faults) -> Option<Vec<T>>
    where
        T::Err: fmt::Display,
    {
        let items = self.array(max, faults)?;
        let (mut list, mut seen) = (Vec::with_capacity(items.len()), HashSet::with_capacity(items.len()));
        let mut whole = true;
        for item in items {
            match item.parse::<T>(faults) {
                Some(value) => {
                    if seen.insert(value.clone()) {
                        list.push(value);
                    }
                }
                None => whole = false,
            }
        }
        whole.then_some(list)
    }
}

/// The message of an error of the domain as a sentence.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", chars.as_str().trim_end_matches('.'))
}

struct Items {
    max: usize,
}

impl<'de> Visitor<'de> for Items {
    type Value = (Vec<&'de RawValue>, usize);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let (mut kept, mut count) = (Vec::new(), 0);
        while let Some(item) = items.next_element::<&RawValue>()? {
            count += 1;
            if count <= self.max {
                kept.push(item);
            }
        }
        Ok((kept, count))
    }
}

struct Entries<'a> {
    kept: Vec<(String, &'a RawValue)>,
    count: usize,
}

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = (Vec<(String, &'de RawValue)>, usize);

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let (mut kept, mut count) = (Vec::new(), 0);
                while let Some((name, value)) = entries.next_entry::<String, &RawValue>()? {
                    count += 1;
                    if count <= MAX_FIELDS {
                        kept.push((name, value));
                    }
                }
                Ok((kept, count))
            }
        }
        deserializer.deserialize_map(Reader).map(|(kept, count)| Self { kept, count })
    }
}

/// An object whose fields are taken one by one; [`Object::finish`] tells those that nobody asked for.
#[derive(Debug)]
pub struct Object<'a> {
    pointer: String,
    left: Vec<(String, &'a str)>,
    asked: Vec<&'static str>,
}

impl<'a> Object<'a> {
    /// Opens an object.
    pub fn open(value: &Value<'a>, faults: &mut Faults) -> Option<Self> {
        if !value.raw.starts_with('{') {
            value.wrong_type(faults, "an object");
            return None;
        }
        let Ok(entries) = serde_json::from_str::<Entries<'a>>(value.raw) else {
            value.fault(faults, "invalid", "An escape in a name of this object stands for no character.");
            return None;
        };
        if entries.count > MAX_FIELDS {
            value.fault(faults, "too_many", format!("This object has {} fields.", entries.count));
            return None;
        }
        let mut left: Vec<(String, &str)> = Vec::with_capacity(entries.kept.len());
        for (name, raw) in entries.kept {
            // Few enough to be looked through.
            if left.iter().all(|(other, _)| *other != name) {
                left.push((name, raw.get()));
            } else {
                faults.add(
                    member(&value.pointer, &name),
                    "duplicate_key",
                    "This field stands here more than once: which one would count is anybody's guess.",
                );
            }
        }
        Some(Self { pointer: value.pointer.clone(), left, asked: Vec::new() })
    }

    /// The place of a field of this object.
    #[must_use]
    pub fn at(&self, name: &str) -> String {
        member(&self.pointer, name)
    }

    /// A field as it stands there, null included.
    pub fn take(&mut self, name: &'static str) -> Option<Value<'a>> {
        self.asked.push(name);
        let index = self.left.iter().position(|(field, _)| field == name)?;
        let (_, raw) = self.left.swap_remove(index);
        Some(Value::new(raw, member(&self.pointer, name)))
    }

    /// A field that may be left out or null.
    pub fn optional(&mut self, name: &'static str) -> Option<Value<'a>> {
        self.take(name).filter(|value| !value.is_null())
    }

    /// A field that must be there.
    pub fn required(&mut self, name: &'static str, faults: &mut Faults) -> Option<Value<'a>> {
        let value = self.optional(name);
        if value.is_none() {
            faults.add(self.at(name), "required", format!("`{name}` is required."));
        }
        value
    }

    /// A field of which nothing, null and a value each mean something else.
    pub fn field<T>(
        &mut self,
        name: &'static str,
        faults: &mut Faults,
        read: impl FnOnce(&Value<'a>, &mut Faults) -> Option<T>,
    ) -> Field<T> {
        match self.take(name) {
            None => Field::Absent,
            Some(value) if value.is_null() => Field::Clear,
            // Where it cannot be read there is a fault, and the field does not matter any more.
            Some(value) => read(&value, faults).map_or(Field::Absent, Field::Set),
        }
    }

    /// Tells the fields that nobody asked for. `places` says where guessed names live.
    pub fn finish(self, places: &[(&str, &str)], faults: &mut Faults) {
        for (name, _) in &self.left {
            let shown: String = name.chars().take(64).collect();
            let place = places.iter().find(|(guess, _)| guess == name).map(|(_, place)| *place);
            let detail = match (place, spelling::closest(name, self.asked.iter().copied())) {
                (Some(place), _) => format!("`{shown}` is not a field here: {place}."),
                (None, Some(meant)) => format!("`{shown}` is not a field here: did you mean `{meant}`?"),
                (None, None) => {
                    let known: Vec<String> = self.asked.iter().map(|field| format!("`{field}`")).collect();
                    format!("`{shown}` is not a field here; these are: {}.", known.join(", "))
                }
            };
            faults.add(member(&self.pointer, &shown), "unknown_field", detail);
        }
    }
}

/// The parameters of a query, taken one by one as the fields of an [`Object`] are.
#[derive(Debug)]
pub struct Query {
    left: Vec<(String, String)>,
    asked: Vec<&'static str>,
}

impl Query {
    /// Reads the query of a request.
    pub fn open(raw: Option<&str>, faults: &mut Faults) -> Self {
        let mut left: Vec<(String, String)> = Vec::new();
        for pair in raw.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).take(MAX_PARAMETERS) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Some((name, value)) = decode(name).zip(decode(value)) else {
                faults.push(parameter(&shown(pair), "invalid", "This is not percent-encoded UTF-8."));
                continue;
            };
            if left.iter().any(|(other, _)| *other == name) {
                faults.push(parameter(&shown(&name), "duplicate_key", "This parameter is given more than once."));
            } else {
                left.push((name, value));
            }
        }
        Self { left, asked: Vec::new() }
    }

    /// A parameter.
    pub fn take(&mut self, name: &'static str) -> Option<String> {
        self.asked.push(name);
        let index = self.left.iter().position(|(other, _)| other == name)?;
        Some(self.left.swap_remove(index).1)
    }

    /// A parameter that is one of ours.
    pub fn parse<T: FromStr>(&mut self, name: &'static str, faults: &mut Faults) -> Option<T>
    where
        T::Err: fmt::Display,
    {
        match self.take(name)?.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                faults.push(parameter(name, "invalid", sentence(&error.to_string())));
                None
            }
        }
    }

    /// Tells the parameters that nobody asked for.
    pub fn finish(self, faults: &mut Faults) {
        for (name, _) in &self.left {
            let shown = shown(name);
            let detail = spelling::closest(name, self.asked.iter().copied()).map_or_else(
                || {
                    let known: Vec<String> = self.asked.iter().map(|known| format!("`{known}`")).collect();
                    if known.is_empty() {
                        format!("`{shown}` is not a parameter here; there are none.")
                    } else {
                        format!("`{shown}` is not a parameter here; these are: {}.", known.join(", "))
                    }
                },
                |meant| format!("`{shown}` is not a parameter here: did you mean `{meant}`?"),
            );
            faults.push(parameter(&shown, "unknown_parameter", detail));
        }
    }
}

/// A fault of a parameter of the query or of the path.
#[must_use]
pub fn parameter(name: &str, code: &'static str, detail: impl Into<Cow<'static, str>>) -> Fault {
    Fault { place: Place::Parameter(name.to_owned()), code, detail: detail.into() }
}

fn shown(name: &str) -> String {
    name.chars().take(64).collect()
}

fn decode(text: &str) -> Option<String> {
    let spaced = text.replace('+', " ");
    percent_encoding::percent_decode_str(&spaced).decode_utf8().ok().map(Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::device::UserId;

    fn codes(faults: &Faults) -> Vec<(String, &'static str)> {
        faults
            .list()
            .iter()
            .map(|fault| match &fault.place {
                Place::Pointer(name) | Place::Parameter(name) => (name.clone(), fault.code),
                Place::Header(name) => ((*name).to_owned(), fault.code),
            })
            .collect()
    }

    #[test]
    fn what_is_not_json_is_told_with_its_position() {
        for (body, expected) in [
            ("", "empty"),
            ("  \n ", "empty"),
            ("{\"topic\": }", "line 1 column 11"),
            ("topic=fr.example", "line 1 column 2"),
            ("{} {}", "trailing characters at line 1 column 4"),
            ("{\n \"a\": 1,\n}", "line 3 column 1"),
            ("\u{feff}{}", "byte order mark"),
        ] {
            let problem = json(body.as_bytes()).unwrap_err();
            assert_eq!(problem.kind(), Kind::NotJson);
            let told = String::from_utf8(problem.body("r")).unwrap();
            assert!(told.contains(expected), "{body:?}: {told}");
        }
        assert!(json(b"{\"a\": \"\xff\"}").is_err(), "UTF-8 is needed");
        assert_eq!(json(b" {\"a\": 1} \n").unwrap(), "{\"a\": 1}");
    }

    #[test]
    fn absent_null_and_a_value_are_three_things() {
        let mut faults = Faults::default();
        let mut object = Object::open(&Value::new(r#"{"a":null,"b":"x"}"#, ""), &mut faults).unwrap();
        let mut read = |name| object.field::<UserId>(name, &mut faults, Value::parse);
        assert_eq!(read("a"), Field::Clear);
        assert_eq!(read("b"), Field::Set("x".parse().unwrap()));
        assert_eq!(read("c"), Field::Absent);
        assert!(faults.is_empty());
    }

    #[test]
    fn all_faults_are_collected_with_their_pointers() {
        let mut faults = Faults::default();
        let text =
            r#"{"n":"7","s":7,"l":["ok","",3],"b":1,"d":1,"d":2,"Num":1,"title":"x","colour":1,"w":"x","f":1.0}"#;
        let mut object = Object::open(&Value::new(text, ""), &mut faults).unwrap();
        assert_eq!(object.optional("n").unwrap().integer(&mut faults), None);
        assert_eq!(object.optional("f").unwrap().integer(&mut faults), None);
        assert_eq!(object.optional("s").unwrap().string(&mut faults), None);
        assert_eq!(object.optional("l").unwrap().list::<UserId>(10, &mut faults), None);
        assert_eq!(object.optional("b").unwrap().boolean(&mut faults), None);
        assert_eq!(object.optional("w").unwrap().word(&[("a", 1), ("b", 2)], &mut faults), None);
        assert!(object.required("missing", &mut faults).is_none());
        assert_eq!(object.take("d").unwrap().raw(), "1");
        object.take("num");
        object.finish(&[("title", "it lives at /payload/aps/alert/title")], &mut faults);
        let codes = codes(&faults);
        let mut sorted: Vec<_> = codes.iter().map(|(p, c)| (p.as_str(), *c)).collect();
        sorted.sort_unstable();
        assert_eq!(
            sorted,
            [
                ("/Num", "unknown_field"),
                ("/b", "type"),
                ("/colour", "unknown_field"),
                ("/d", "duplicate_key"),
                ("/f", "type"),
                ("/l/1", "invalid"),
                ("/l/2", "type"),
                ("/missing", "required"),
                ("/n", "type"),
                ("/s", "type"),
                ("/title", "unknown_field"),
                ("/w", "invalid"),
            ]
        );
        let told: Vec<&str> = faults.list().iter().map(|fault| fault.detail.as_ref()).collect();
        assert!(told.iter().any(|d| d.contains("did you mean `num`?")), "{told:?}");
        assert!(told.iter().any(|d| d.contains("/payload/aps/alert/title")), "{told:?}");
    }

    #[test]
    fn a_list_keeps_its_order_and_merges_repeats_and_is_bounded() {
        let mut faults = Faults::default();
        let list = Value::new(r#"["b","a","b","\u0061"]"#, "/l").list::<UserId>(10, &mut faults).unwrap();
        let list: Vec<&str> = list.iter().map(UserId::as_str).collect();
        assert_eq!(list, ["b", "a"]);
        assert!(Value::new("[1,2,3]", "/l").array(2, &mut faults).is_none());
        assert_eq!(codes(&faults), [("/l".to_owned(), "too_many")]);
    }

    #[test]
    fn strange_json_is_a_fault_and_no_panic() {
        for text in [
            "{}",
            "[]",
            "\"\"",
            "\"\\ud800\"",
            "{\"\\ud800\":1}",
            "1e999",
            "-0",
            "99999999999999999999",
            "nul\u{0}",
            "true",
            "\"\\u0000\"",
        ] {
            let Ok(raw) = json(text.as_bytes()) else { continue };
            let mut faults = Faults::default();
            let value = Value::new(raw, "");
            value.string(&mut faults);
            value.integer(&mut faults);
            value.boolean(&mut faults);
            value.list::<UserId>(5, &mut faults);
            if let Some(object) = Object::open(&value, &mut faults) {
                object.finish(&[], &mut faults);
            }
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(json(deep.as_bytes()).is_ok(), "depth alone breaks nothing");
    }

    #[test]
    fn a_query_is_read_decoded_and_unknown_parameters_are_told() {
        let mut faults = Faults::default();
        let mut query = Query::open(Some("user_id=livreur%2042&tag=a+b&limit=5&limit=6&usr=1&x=%ff"), &mut faults);
        assert_eq!(query.take("user_id").unwrap(), "livreur 42");
        assert_eq!(query.take("tag").unwrap(), "a b");
        assert_eq!(query.parse::<u32>("limit", &mut faults), Some(5));
        assert_eq!(query.take("cursor"), None);
        query.finish(&mut faults);
        let mut codes = codes(&faults);
        codes.sort_unstable();
        assert_eq!(
            codes,
            [
                ("limit".to_owned(), "duplicate_key"),
                ("usr".to_owned(), "unknown_parameter"),
                ("x=%ff".to_owned(), "invalid"),
            ]
        );
    }
}
