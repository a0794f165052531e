//! Statements that are put together from parts, for both dialects: text, values, rows.
//!
//! Promises: only text that this crate wrote reaches the text of a statement; whatever came from outside is bound, or, in
//! statements that go to a server together, spelled in digits ([`Conn::all`]). Both dialects take `?`. What a dialect spells
//! differently is said by [`Conn::kind`] and marked `Differs:`.

use std::fmt::Write as _;

use futures_util::{TryStreamExt as _, stream::BoxStream};
use sqlx::{
    Arguments as _, AssertSqlSafe, Either, Executor as _, Row as _,
    mysql::{MySqlArguments, MySqlConnection, MySqlQueryResult, MySqlRow},
    sqlite::{SqliteArguments, SqliteConnection, SqliteQueryResult, SqliteRow},
};

use super::{BoxError, Kind, StoreError};
use crate::domain::{clock::Timestamp, delivery::ChunkKey};

/// The most rows of one statement.
pub(super) const ROWS_A_STATEMENT: usize = 256;

/// The most bytes of one statement: well below the `max_allowed_packet` of any server.
const BYTES_A_STATEMENT: usize = 2 << 20;

/// The most bytes of the texts and values of statements that go to a server together; in digits they are twice as many.
const TOGETHER: usize = 512 << 10;

/// One bound value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Value {
    /// `NULL`.
    Null,
    /// An integer.
    Int(i64),
    /// Characters.
    Text(String),
    /// A word of ours.
    Word(&'static str),
    /// Bytes.
    Bytes(Vec<u8>),
    /// An id.
    Id([u8; 16]),
}

impl Value {
    fn bytes(&self) -> usize {
        match self {
            Self::Null => 1,
            Self::Int(_) => 9,
            Self::Text(text) => text.len() + 9,
            Self::Word(word) => word.len() + 9,
            Self::Bytes(bytes) => bytes.len() + 9,
            Self::Id(id) => id.len() + 9,
        }
    }

    /// As a server reads it within a text: in digits, so that nothing of it can be taken for anything else.
    fn spell(&self, text: &mut String) {
        let (before, bytes) = match self {
            Self::Null => return text.push_str("NULL"),
            Self::Int(value) => {
                // Writing into a string never fails.
                _ = write!(text, "{value}");
                return;
            }
            Self::Text(characters) => ("_utf8mb4 X'", characters.as_bytes()),
            Self::Word(word) => ("_utf8mb4 X'", word.as_bytes()),
            Self::Bytes(bytes) => ("X'", bytes.as_slice()),
            Self::Id(id) => ("X'", id.as_slice()),
        };
        text.push_str(before);
        text.push_str(&hex::encode(bytes));
        text.push('\'');
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Int(i64::from(value))
    }
}

impl From<u16> for Value {
    fn from(value: u16) -> Self {
        Self::Int(i64::from(value))
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Int(i64::from(value))
    }
}

impl From<Timestamp> for Value {
    fn from(value: Timestamp) -> Self {
        Self::Int(value.as_millis())
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<&[u8]> for Value {
    fn from(value: &[u8]) -> Self {
        Self::Bytes(value.to_vec())
    }
}

impl From<Vec<u8>> for Value {
    fn from(value: Vec<u8>) -> Self {
        Self::Bytes(value)
    }
}

impl<T: Into<Self>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// A column that hardly any row has another value for: its number, the value, and the same as text. Rows that have all of
/// them do not bind them: on a server each `?` costs about as much as a small column.
pub(super) type Usual = (usize, Value, &'static str);

/// A statement in the making.
#[derive(Debug, Clone)]
pub(super) struct Statement {
    text: String,
    values: Vec<Value>,
}

impl Statement {
    /// Opens a statement with its name and its first words.
    pub(super) fn new(text: &'static str) -> Self {
        Self { text: text.to_owned(), values: Vec::new() }
    }

    /// `INSERT … VALUES` of as many of these rows as one statement may hold: a power of two, so that groups of all lengths
    /// make a few statements, which stay prepared. The rest stays there.
    fn insert(
        head: &'static str,
        usual: &[Usual],
        rest: &mut std::vec::IntoIter<Vec<Value>>,
        tail: &'static str,
    ) -> Option<Self> {
        let columns = rest.as_slice().first()?.len();
        let mut bytes = 0;
        let fits = rest
            .as_slice()
            .iter()
            .take(ROWS_A_STATEMENT)
            .take_while(|row| {
                bytes += row.iter().map(Value::bytes).sum::<usize>();
                bytes <= BYTES_A_STATEMENT
            })
            .count()
            .max(1);
        let mut statement = Self::new(head);
        // The greatest power of two that fits.
        let count = 1 << fits.ilog2();
        statement.values.reserve(count * columns);
        statement.text.reserve(count * (2 * columns + 3 + usual.iter().map(|(_, _, text)| text.len()).sum::<usize>()));
        statement.push(" VALUES ").rows_with(rest.by_ref().take(count), usual, "").push(tail);
        Some(statement)
    }

    /// [`Conn::insert`] as statements.
    pub(super) fn inserts(head: &'static str, rows: Vec<Vec<Value>>, tail: &'static str) -> Vec<Self> {
        let mut rest = rows.into_iter();
        std::iter::from_fn(|| Self::insert(head, &[], &mut rest, tail)).collect()
    }

    /// Its first line, by which a slow one is known.
    fn name(&self) -> &str {
        self.text.split_inclusive('\n').next().unwrap_or_default()
    }

    fn bytes(&self) -> usize {
        self.text.len() + self.values.iter().map(Value::bytes).sum::<usize>()
    }

    /// The same with its values spelled, at the end of a text.
    fn spell(&self, text: &mut String) {
        debug_assert_eq!(
            self.text.matches('?').count(),
            self.values.len(),
            "a `?` is a value's place, and nothing else is"
        );
        let mut pieces = self.text.split('?');
        text.push_str(pieces.next().unwrap_or_default());
        for (value, piece) in self.values.iter().zip(pieces) {
            value.spell(text);
            text.push_str(piece);
        }
        text.push_str(";\n");
    }

    /// More text.
    pub(super) fn push(&mut self, text: &'static str) -> &mut Self {
        self.text.push_str(text);
        self
    }

    /// A value, as `?`.
    pub(super) fn bind(&mut self, value: impl Into<Value>) -> &mut Self {
        self.text.push('?');
        self.values.push(value.into());
        self
    }

    /// `?,?,…` with these values.
    pub(super) fn values(&mut self, values: impl IntoIterator<Item = Value>) -> &mut Self {
        for (at, value) in values.into_iter().enumerate() {
            if at > 0 {
                self.text.push(',');
            }
            self.bind(value);
        }
        self
    }

    /// `(?,?,…)` with these values, filled up to a power of two with the last one: so that lists of all lengths make
    /// a few statements, which stay prepared. An empty list becomes `(NULL)`, which nothing is in.
    pub(super) fn list<V: Into<Value>>(&mut self, values: impl IntoIterator<Item = V>) -> &mut Self {
        let mut values: Vec<Value> = values.into_iter().map(Into::into).collect();
        match values.last().cloned() {
            Some(last) => {
                values.resize(values.len().next_power_of_two(), last);
                self.push("(").values(values).push(")")
            }
            None => self.push("(NULL)"),
        }
    }

    /// `usual`: by column, the text of those that are not bound.
    fn row(
        &mut self,
        values: impl IntoIterator<Item = Value>,
        usual: &[Option<&'static str>],
        tail: &'static str,
    ) -> &mut Self {
        self.text.push('(');
        let usual = usual.iter().copied().chain(std::iter::repeat(None));
        for (column, (value, usual)) in values.into_iter().zip(usual).enumerate() {
            if column > 0 {
                self.text.push(',');
            }
            match usual {
                Some(text) => self.push(text),
                None => self.bind(value),
            };
        }
        self.text.push_str(tail);
        self.text.push(')');
        self
    }

    /// `(?,?,…),(?,?,…),…` with these values; `tail` stands behind the last value of each row.
    pub(super) fn rows<R>(&mut self, rows: impl IntoIterator<Item = R>, tail: &'static str) -> &mut Self
    where
        R: IntoIterator<Item = Value>,
    {
        self.rows_with(rows, &[], tail)
    }

    /// The same for rows that all have the usual values.
    fn rows_with<R>(&mut self, rows: impl IntoIterator<Item = R>, usual: &[Usual], tail: &'static str) -> &mut Self
    where
        R: IntoIterator<Item = Value>,
    {
        let mut texts = vec![None; usual.iter().map(|(column, ..)| column + 1).max().unwrap_or(0)];
        for (column, _, text) in usual {
            if let Some(place) = texts.get_mut(*column) {
                *place = Some(*text);
            }
        }
        for (at, row) in rows.into_iter().enumerate() {
            if at > 0 {
                self.text.push(',');
            }
            self.row(row, &texts, tail);
        }
        self
    }

    /// `(notification_id, number) IN (…)`, for at least one key.
    pub(super) fn keys<'k>(&mut self, kind: Kind, keys: impl IntoIterator<Item = &'k ChunkKey>) -> &mut Self {
        let mut rows: Vec<Vec<Value>> =
            keys.into_iter().map(|key| vec![id_value(key.notification.as_uuid()), key.number.into()]).collect();
        // MariaDB finds one row by `(a, b) IN ((?, ?))` in a SELECT, and reads the whole table in an UPDATE.
        if let [one] = rows.as_slice()
            && let [notification, number] = one.as_slice()
        {
            self.push("notification_id = ").bind(notification.clone());
            return self.push(" AND number = ").bind(number.clone());
        }
        if let Some(last) = rows.last().cloned() {
            rows.resize(rows.len().next_power_of_two(), last);
        }
        self.push("(notification_id, number) IN (");
        // Differs: SQLite wants VALUES before a list of rows.
        if kind == Kind::Sqlite {
            self.push("VALUES ");
        }
        self.rows(rows, "").push(")")
    }
}

/// Binds the values of a statement to a query of either database: thousands, in some, for which there is room from the start.
macro_rules! bound {
    ($statement:expr, $arguments:ty) => {{
        let Statement { text, values } = $statement;
        let mut arguments = <$arguments>::default();
        arguments.reserve(values.len(), values.iter().map(Value::bytes).sum());
        for value in values {
            match value {
                Value::Null => arguments.add(None::<i64>),
                Value::Int(value) => arguments.add(value),
                Value::Text(value) => arguments.add(value),
                Value::Word(value) => arguments.add(value),
                Value::Bytes(value) => arguments.add(value),
                Value::Id(value) => arguments.add(value.as_slice()),
            }
            .map_err(sqlx::Error::Encode)?;
        }
        sqlx::query_with(AssertSqlSafe(text), arguments)
    }};
}

/// An id as its 16 bytes.
pub(super) fn id_value(id: &uuid::Uuid) -> Value {
    Value::Id(*id.as_bytes())
}

/// A row of either database. Columns are asked for by place, in the order of the statement.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Mysql(MySqlRow),
}

impl Row {
    /// An integer, or `NULL`.
    pub(super) fn int_or_null(&self, column: usize) -> Result<Option<i64>, StoreError> {
        match self {
            Self::Sqlite(row) => row.try_get_unchecked(column),
            Self::Mysql(row) => row.try_get_unchecked(column),
        }
        .map_err(|error| StoreError::Statement(error.into()))
    }

    /// An integer.
    pub(super) fn int(&self, column: usize) -> Result<i64, StoreError> {
        self.int_or_null(column)?.ok_or_else(missing)
    }

    /// Bytes or characters as bytes, or `NULL`.
    pub(super) fn bytes_or_null(&self, column: usize) -> Result<Option<&[u8]>, StoreError> {
        match self {
            Self::Sqlite(row) => row.try_get_unchecked(column),
            Self::Mysql(row) => row.try_get_unchecked(column),
        }
        .map_err(|error| StoreError::Statement(error.into()))
    }

    /// Bytes or characters as bytes.
    pub(super) fn bytes(&self, column: usize) -> Result<&[u8], StoreError> {
        self.bytes_or_null(column)?.ok_or_else(missing)
    }
}

fn missing() -> StoreError {
    StoreError::Statement("a column that is never NULL is NULL".into())
}

/// A connection of either database, inside a transaction.
pub(super) struct Conn<'c> {
    of: Of<'c>,
    /// What is still to be said before the first statement.
    begins: Option<&'static str>,
}

enum Of<'c> {
    Sqlite(&'c mut SqliteConnection),
    Mysql(&'c mut MySqlConnection),
}

impl<'c> From<&'c mut SqliteConnection> for Conn<'c> {
    fn from(conn: &'c mut SqliteConnection) -> Self {
        Self { of: Of::Sqlite(conn), begins: None }
    }
}

impl<'c> From<&'c mut MySqlConnection> for Conn<'c> {
    fn from(conn: &'c mut MySqlConnection) -> Self {
        Self { of: Of::Mysql(conn), begins: None }
    }
}

/// What came of one of several statements.
#[derive(Default)]
pub(super) struct Done {
    /// How many rows it met.
    pub(super) met: u64,
    /// What it has read.
    pub(super) rows: Vec<Row>,
}

impl Conn<'_> {
    /// The same, on which this is said together with its first statements, or before the first.
    pub(super) fn that_begins(self, begins: Option<&'static str>) -> Self {
        Self { begins, ..self }
    }

    /// Which dialect it speaks.
    pub(super) const fn kind(&self) -> Kind {
        match self.of {
            Of::Sqlite(_) => Kind::Sqlite,
            Of::Mysql(_) => Kind::Mysql,
        }
    }

    /// Says what is in a text.
    async fn say(&mut self, text: String) -> Result<Vec<Done>, sqlx::Error> {
        let text = sqlx::raw_sql(AssertSqlSafe(text));
        match &mut self.of {
            Of::Sqlite(conn) => gather(conn.fetch_many(text), SqliteQueryResult::rows_affected, Row::Sqlite).await,
            Of::Mysql(conn) => gather(conn.fetch_many(text), MySqlQueryResult::rows_affected, Row::Mysql).await,
        }
    }

    /// Runs a statement; what came of it.
    async fn one(&mut self, statement: Statement) -> Result<Done, sqlx::Error> {
        if let Some(begins) = self.begins.take() {
            self.say(begins.to_owned()).await?;
        }
        let done = match &mut self.of {
            Of::Sqlite(conn) => {
                let steps = conn.fetch_many(bound!(statement, SqliteArguments));
                gather(steps, SqliteQueryResult::rows_affected, Row::Sqlite).await
            }
            Of::Mysql(conn) => {
                let steps = conn.fetch_many(bound!(statement, MySqlArguments));
                gather(steps, MySqlQueryResult::rows_affected, Row::Mysql).await
            }
        };
        Ok(done?.pop().unwrap_or_default())
    }

    /// Runs a statement; how many rows it met.
    pub(super) async fn execute(&mut self, statement: Statement) -> Result<u64, sqlx::Error> {
        Ok(self.one(statement).await?.met)
    }

    /// Runs a statement and reads all its rows.
    pub(super) async fn fetch(&mut self, statement: Statement) -> Result<Vec<Row>, sqlx::Error> {
        Ok(self.one(statement).await?.rows)
    }

    /// Runs statements one behind the other: to a server they go together, because on a machine that has much to do each
    /// journey there takes milliseconds. What came of each, in their order. At the first that fails it ends.
    ///
    /// For statements that are small: a server reads the text of each anew, and of those that go together there are no more
    /// bytes than [`TOGETHER`].
    pub(super) async fn all(&mut self, statements: Vec<Statement>) -> Result<Vec<Done>, sqlx::Error> {
        let mut done = Vec::with_capacity(statements.len());
        let mut rest = statements.into_iter().peekable();
        while let Some(first) = rest.next() {
            let mut bytes = first.bytes();
            let alone = self.kind() == Kind::Sqlite || bytes > TOGETHER;
            let mut piece = vec![first];
            while let Some(next) = rest.next_if(|next| !alone && bytes + next.bytes() <= TOGETHER) {
                bytes += next.bytes();
                piece.push(next);
            }
            match piece.len() {
                // Alone it may be prepared already.
                1 if alone || self.begins.is_none() => done.push(self.one(piece.remove(0)).await?),
                _ => done.extend(self.together(&piece).await?),
            }
        }
        Ok(done)
    }

    /// As one text, opened by the name of the first.
    async fn together(&mut self, statements: &[Statement]) -> Result<Vec<Done>, sqlx::Error> {
        let begins = self.begins.take();
        let mut text = String::new();
        if let (Some(begins), Some(first)) = (begins, statements.first()) {
            text.extend([first.name(), begins, ";\n"]);
        }
        for statement in statements {
            statement.spell(&mut text);
        }
        let mut done = self.say(text).await?;
        if begins.is_some() && !done.is_empty() {
            done.remove(0);
        }
        Ok(done)
    }

    /// Inserts rows, a power of two a statement: so that groups of all lengths make a few statements, which stay
    /// prepared. `tail` says what to do about rows that are there.
    ///
    /// Statements that are prepared once and closed were tried: sqlx leaves Nagle's algorithm on, MySQL does not answer
    /// a close, and the next statement waits 40 ms for the delayed acknowledgement.
    pub(super) async fn insert(
        &mut self,
        head: &'static str,
        rows: Vec<Vec<Value>>,
        tail: &'static str,
    ) -> Result<(), sqlx::Error> {
        self.insert_as(head, &[], rows, tail).await
    }

    /// As [`Self::insert`], for rows most of which have the usual values in some columns.
    pub(super) async fn insert_mostly(
        &mut self,
        head: &'static str,
        usual: &[Usual],
        rows: Vec<Vec<Value>>,
        tail: &'static str,
    ) -> Result<(), sqlx::Error> {
        self.insert_alike(head, &[usual], rows, tail).await
    }

    /// The same where there are several kinds of usual rows: each is written as the first of these whose values it has.
    pub(super) async fn insert_alike(
        &mut self,
        head: &'static str,
        usuals: &[&[Usual]],
        rows: Vec<Vec<Value>>,
        tail: &'static str,
    ) -> Result<(), sqlx::Error> {
        let mut others = rows;
        for usual in usuals {
            let is_usual = |row: &Vec<Value>| usual.iter().all(|(column, value, _)| row.get(*column) == Some(value));
            let (most, rest) = others.into_iter().partition(is_usual);
            self.insert_as(head, usual, most, tail).await?;
            others = rest;
        }
        self.insert_as(head, &[], others, tail).await
    }

    async fn insert_as(
        &mut self,
        head: &'static str,
        usual: &[Usual],
        rows: Vec<Vec<Value>>,
        tail: &'static str,
    ) -> Result<(), sqlx::Error> {
        let mut rest = rows.into_iter();
        while let Some(statement) = Statement::insert(head, usual, &mut rest, tail) {
            self.execute(statement).await?;
        }
        Ok(())
    }
}

/// What came of statements, as it comes.
async fn gather<R, W>(
    mut steps: BoxStream<'_, Result<Either<R, W>, sqlx::Error>>,
    met: fn(&R) -> u64,
    row: fn(W) -> Row,
) -> Result<Vec<Done>, sqlx::Error> {
    let (mut done, mut rows) = (Vec::new(), Vec::new());
    while let Some(step) = steps.try_next().await? {
        match step {
            Either::Left(end) => done.push(Done { met: met(&end), rows: std::mem::take(&mut rows) }),
            Either::Right(read) => rows.push(row(read)),
        }
    }
    Ok(done)
}

/// A row that this version would never write.
pub(super) fn corrupt(
    table: &'static str,
    column: &'static str,
    row: impl std::fmt::Display,
    source: impl Into<BoxError>,
) -> StoreError {
    StoreError::Corrupt { table, column, row: row.to_string(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_a_text_for_a_server_are_digits_whatever_is_in_them() {
        let mut statement = Statement::new("-- a.name\nUPDATE t SET a = ");
        statement.bind("'; DROP TABLE devices; -- é?").push(", b = ").bind(-7_i64).push(", c = ").bind(None::<i64>);
        statement
            .push(", d = ")
            .bind(b"\\'?\0".as_slice())
            .push(" WHERE e IN ")
            .list([Value::Word("un"), Value::Id([0xab; 16])]);
        let mut text = "before;\n".to_owned();
        statement.spell(&mut text);
        assert_eq!(
            text,
            "before;\n-- a.name\nUPDATE t SET a = _utf8mb4 X'273b2044524f50205441424c4520646576696365733b202d2d20c3a93f', \
             b = -7, c = NULL, d = X'5c273f00' WHERE e IN (_utf8mb4 X'756e',X'abababababababababababababababab');\n"
        );
        assert_eq!(statement.name(), "-- a.name\n");
    }
}
