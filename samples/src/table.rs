use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use csv::{Position, StringRecord};
use time::Date;
use time::format_description::StaticFormatDescription;
use time::macros::format_description;

const DATE: StaticFormatDescription = format_description!("[year]-[month]-[day]");

/// A file of the sample cannot be used. Nothing of it was.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The file as a whole.
    #[error("{}: {reason}", file.display())]
    File { file: PathBuf, reason: Reason },
    /// One cell, or one line when `column` is empty. Lines count from 1, the header included.
    #[error("{}, line {line}{}: {reason}", file.display(), in_column(column))]
    Cell {
        file: PathBuf,
        line: u64,
        column: String,
        reason: Reason,
    },
}

/// What is wrong at that place.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error("cannot be read: {0}")]
    Unreadable(#[from] std::io::Error),
    #[error("is not CSV in UTF-8: {0}")]
    Malformed(String),
    #[error("the header has no column `{0}`")]
    MissingColumn(&'static str),
    #[error("must not be empty")]
    Empty,
    #[error("`{0}` is longer than the {1} bytes allowed")]
    TooLong(String, usize),
    #[error("`{0}` is not a whole number that fits")]
    NotANumber(String),
    #[error("`{0}` is not a decimal number such as 12.50")]
    NotADecimal(String),
    #[error("`{0}` is not a date such as 2012-07-04")]
    NotADate(String),
    #[error("{0} is less than the {1} allowed")]
    TooSmall(i64, i64),
    #[error("{0} stands twice")]
    Duplicate(String),
    #[error("there is no {0}")]
    Unknown(String),
}

fn in_column(column: &str) -> String {
    if column.is_empty() {
        String::new()
    } else {
        format!(", column `{column}`")
    }
}

/// One CSV file with a header line.
pub(crate) struct Table {
    file: PathBuf,
    header: StringRecord,
    reader: csv::Reader<File>,
}

/// One line of a [`Table`].
pub(crate) struct Row<'a> {
    file: &'a Path,
    header: &'a StringRecord,
    record: StringRecord,
    line: u64,
}

impl Table {
    /// Errors when the file cannot be read or lacks one of `columns`. Other columns are ignored.
    pub(crate) fn open(file: &Path, columns: &[&'static str]) -> Result<Self, SampleError> {
        let whole = |reason| SampleError::File {
            file: file.to_owned(),
            reason,
        };
        let opened = File::open(file).map_err(|error| whole(error.into()))?;
        let mut reader = csv::Reader::from_reader(opened);
        let header = reader.headers().map_err(|error| malformed(file, &error))?.clone();
        for &column in columns {
            if !header.iter().any(|name| name == column) {
                return Err(whole(Reason::MissingColumn(column)));
            }
        }
        Ok(Self {
            file: file.to_owned(),
            header,
            reader,
        })
    }

    /// Turns every line into a value by `parse`; stops at the first error.
    pub(crate) fn rows<T>(
        mut self,
        mut parse: impl FnMut(&Row<'_>) -> Result<T, SampleError>,
    ) -> Result<Vec<T>, SampleError> {
        let mut values = Vec::new();
        for record in self.reader.records() {
            let record = record.map_err(|error| malformed(&self.file, &error))?;
            let line = record.position().map_or(0, Position::line);
            let row = Row {
                file: &self.file,
                header: &self.header,
                record,
                line,
            };
            values.push(parse(&row)?);
        }
        Ok(values)
    }
}

impl Row<'_> {
    /// The cell, which may be empty.
    pub(crate) fn text(&self, column: &'static str) -> Result<&str, SampleError> {
        let position = self.header.iter().position(|name| name == column);
        position
            .and_then(|position| self.record.get(position))
            .ok_or_else(|| self.error(column, Reason::MissingColumn(column)))
    }

    /// The cell, not empty and of at most `limit` bytes.
    pub(crate) fn bounded(&self, column: &'static str, limit: usize) -> Result<String, SampleError> {
        match self.text(column)? {
            "" => Err(self.error(column, Reason::Empty)),
            text if text.len() > limit => Err(self.error(column, Reason::TooLong(text.to_owned(), limit))),
            text => Ok(text.to_owned()),
        }
    }

    /// A whole number of at least `least`.
    pub(crate) fn integer<T>(&self, column: &'static str, least: T) -> Result<T, SampleError>
    where
        T: FromStr + Copy + PartialOrd + Into<i64>,
    {
        let text = self.text(column)?;
        match text.parse::<T>() {
            Ok(number) if number < least => Err(self.error(column, Reason::TooSmall(number.into(), least.into()))),
            Ok(number) => Ok(number),
            Err(_) => Err(self.error(column, Reason::NotANumber(text.to_owned()))),
        }
    }

    /// A decimal number without sign or exponent, kept as text: no binary fraction touches money.
    pub(crate) fn decimal(&self, column: &'static str) -> Result<String, SampleError> {
        let text = self.text(column)?;
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if digits(whole) && digits(fraction) && whole.len() <= 12 && fraction.len() <= 6 {
            Ok(text.to_owned())
        } else {
            Err(self.error(column, Reason::NotADecimal(text.to_owned())))
        }
    }

    pub(crate) fn date(&self, column: &'static str) -> Result<Date, SampleError> {
        let text = self.text(column)?;
        Date::parse(text, DATE).map_err(|_| self.error(column, Reason::NotADate(text.to_owned())))
    }

    /// An empty cell is `None`.
    pub(crate) fn optional_date(&self, column: &'static str) -> Result<Option<Date>, SampleError> {
        match self.text(column)? {
            "" => Ok(None),
            _ => self.date(column).map(Some),
        }
    }

    /// An error at a cell of this line.
    pub(crate) fn error(&self, column: &str, reason: Reason) -> SampleError {
        SampleError::Cell {
            file: self.file.to_owned(),
            line: self.line,
            column: column.to_owned(),
            reason,
        }
    }
}

fn malformed(file: &Path, error: &csv::Error) -> SampleError {
    let reason = match error.kind() {
        csv::ErrorKind::Io(io) => Reason::Malformed(io.to_string()),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            Reason::Malformed(format!("the line has {len} cells, the header {expected_len}"))
        }
        csv::ErrorKind::Utf8 { err, .. } => Reason::Malformed(err.to_string()),
        _ => Reason::Malformed(error.to_string()),
    };
    match error.position() {
        Some(position) => SampleError::Cell {
            file: file.to_owned(),
            line: position.line(),
            column: String::new(),
            reason,
        },
        None => SampleError::File {
            file: file.to_owned(),
            reason,
        },
    }
}
