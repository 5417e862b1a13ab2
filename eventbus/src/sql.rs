//! What the errors of databases mean, where they are reached through `sqlx`.

#[cfg(feature = "sqlx-postgres")]
mod postgres;

#[cfg(feature = "sqlx-postgres")]
pub use self::postgres::postgres_probes;
use crate::error::{Error, ErrorKind};

/// Classes an error once, where its code is known.
///
/// Codes of PostgreSQL are those of its manual, appendix A; codes of SQLite those of "Result and Error Codes". What
/// may pass, such as a lost connection, a deadlock or a full disk, is transient; what the server says about the
/// statement or its values, such as a constraint that is hurt, is permanent.
pub fn from_sqlx(error: sqlx::Error) -> Error {
    let (kind, message) = meaning(&error);
    Error::new(kind, message).caused_by(error)
}

/// Tells whether a failed write may have been stored all the same: the connection ended before its answer.
pub fn is_unknown(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            match of_sqlite(&code) {
                Some(code) => code == IO_ERROR,
                // A server that shuts down may say so after the commit, while it waits for a replica.
                None => code.starts_with("57P"),
            }
        }
        _ => false,
    }
}

pub(crate) fn meaning(error: &sqlx::Error) -> (ErrorKind, &'static str) {
    match error {
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            of_sqlite(&code).map_or_else(|| of_postgres(&code), in_sqlite)
        }
        sqlx::Error::RowNotFound => (ErrorKind::NotFound, "there is no such row"),
        sqlx::Error::PoolTimedOut => (ErrorKind::Unavailable, "the database gave no connection in time"),
        sqlx::Error::PoolClosed => (ErrorKind::Closed, "the connections to the database are closed"),
        sqlx::Error::Tls(_) => (ErrorKind::Unavailable, "TLS with the server failed"),
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
            (ErrorKind::Unavailable, "the connection to the database was lost")
        }
        sqlx::Error::Configuration(_) => (ErrorKind::Config, "the address or its options cannot be used"),
        _ => (ErrorKind::Unexpected, "the answer of the database was not understood"),
    }
}

/// SQLite's primary code, if it is one: its codes have up to four digits, PostgreSQL's are five characters.
fn of_sqlite(code: &str) -> Option<u16> {
    (code.len() < 5).then(|| code.parse::<u16>().ok()).flatten().map(|code| code & 0xff)
}

const IO_ERROR: u16 = 10;

fn in_sqlite(primary: u16) -> (ErrorKind, &'static str) {
    match primary {
        5 | 6 => (ErrorKind::Unavailable, "another connection holds the file's write lock"),
        8 | 3 | 23 => (ErrorKind::Unauthorized, "the file is read-only for this program"),
        IO_ERROR => (ErrorKind::Unavailable, "the file system failed"),
        11 => (ErrorKind::Corrupt, "the database file is damaged"),
        13 => (ErrorKind::Full, "the disk or the file's bound is full"),
        14 => (ErrorKind::Config, "the file cannot be opened: does its folder exist?"),
        18 => (ErrorKind::TooLarge, "a value is too large for SQLite"),
        26 => (ErrorKind::Corrupt, "the file is not an SQLite database"),
        _ => (ErrorKind::Unexpected, "SQLite refused a statement"),
    }
}

fn of_postgres(code: &str) -> (ErrorKind, &'static str) {
    match code {
        "28000" | "28P01" => (ErrorKind::Unauthorized, "the server refused the user or the password"),
        "42501" => (ErrorKind::Unauthorized, "the user lacks a right"),
        "3D000" => (ErrorKind::NotFound, "there is no such database"),
        "42P01" | "3F000" => (ErrorKind::NotFound, "the tables are missing"),
        "53100" => (ErrorKind::Full, "the server's disk is full"),
        "25006" => {
            (ErrorKind::Unavailable, "the server takes no writes: it is a replica or is set read-only")
        }
        "54000" => (ErrorKind::TooLarge, "a value is too large for the server"),
        "55P03" => (ErrorKind::Unavailable, "another transaction holds a lock for too long"),
        "25P02" => (ErrorKind::Unavailable, "an earlier statement of the transaction failed"),
        "40001" | "40P01" => (ErrorKind::Unavailable, "the server asks to try the transaction again"),
        "57014" => (ErrorKind::Timeout, "the server ended the statement"),
        _ if code.starts_with("08")
            || code.starts_with("53")
            || code.starts_with("57P")
            || code.starts_with("58") =>
        {
            (ErrorKind::Unavailable, "the server cannot work now")
        }
        _ => (ErrorKind::Unexpected, "the server refused a statement"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_kinds() {
        for (code, kind) in [
            ("28P01", ErrorKind::Unauthorized),
            ("53100", ErrorKind::Full),
            ("53300", ErrorKind::Unavailable),
            ("57P01", ErrorKind::Unavailable),
            ("40P01", ErrorKind::Unavailable),
            ("22012", ErrorKind::Unexpected),
        ] {
            assert_eq!(of_sqlite(code), None, "{code}");
            assert_eq!(of_postgres(code).0, kind, "{code}");
        }
        for (code, kind) in [
            ("5", ErrorKind::Unavailable),
            // SQLITE_IOERR_WRITE and SQLITE_CONSTRAINT_UNIQUE.
            ("778", ErrorKind::Unavailable),
            ("2067", ErrorKind::Unexpected),
            ("13", ErrorKind::Full),
        ] {
            assert_eq!(of_sqlite(code).map(in_sqlite).map(|(kind, _)| kind), Some(kind), "{code}");
        }
    }
}
