//! One declaration per setting: the clap argument. Its help text is the documentation, its flag, variable and file key
//! are one name in three spellings, and the order of strength is flag, environment, file, default.

use std::{collections::BTreeMap, ffi::OsString, fmt, path::PathBuf, str::FromStr};

use clap::{Arg, ArgMatches, Command, Parser, parser::ValueSource};

/// A value that is never printed. Comes from the environment or a file, not from an argument that `ps` would show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value itself, for the one place that hands it to a client library.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Ok(Self(value.to_owned()))
    }
}

/// The settings in force, ready to be printed.
#[derive(Debug)]
pub struct Effective {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    flag: String,
    variable: String,
    value: String,
    source: &'static str,
    default: String,
    help: String,
}

/// Parses the process's arguments; on a mistake prints what and where, and ends the process with code 2.
pub fn parse_or_exit<C: Parser>() -> (C, Effective) {
    match parse_from(std::env::args_os()) {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    }
}

/// Parses arguments, with the TOML file named by `--config` or `CONFIG_FILE` beneath flags and environment.
///
/// # Errors
/// A usage error: an unknown flag or file key (with the nearest valid one), a value that does not parse.
pub fn parse_from<C: Parser>(args: impl IntoIterator<Item = OsString>) -> Result<(C, Effective), clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let file = read_file::<C>(&args)?;
    let mut command = with_file_defaults(C::command(), &file);
    let matches = command.try_get_matches_from_mut(args)?;
    let effective = effective(&command, &matches, &file);
    let cli = C::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    Ok((cli, effective))
}

/// The file's keys are the long flag names.
fn read_file<C: Parser>(args: &[OsString]) -> Result<BTreeMap<String, String>, clap::Error> {
    let Some(path) = config_path(args) else {
        return Ok(BTreeMap::new());
    };
    let fail = |message: String| C::command().error(clap::error::ErrorKind::ValueValidation, message);
    let shown = path.display();
    let text = std::fs::read_to_string(&path).map_err(|error| fail(format!("cannot read {shown}: {error}")))?;
    let table: toml::Table = text.parse().map_err(|error| fail(format!("{shown}: {error}")))?;
    let known = known_keys(&C::command());
    let mut values = BTreeMap::new();
    for (key, value) in table {
        if !known.contains(&key) {
            let near = known
                .iter()
                .max_by(|a, b| strsim::jaro(a, &key).total_cmp(&strsim::jaro(b, &key)))
                .map(|name| format!(", did you mean `{name}`?"))
                .unwrap_or_default();
            return Err(fail(format!("{shown}: unknown setting `{key}`{near}")));
        }
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Array(items) => items
                .iter()
                .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned))
                .collect::<Vec<_>>()
                .join(","),
            toml::Value::Table(_) => return Err(fail(format!("{shown}: `{key}` is a table, expected a value"))),
            other => other.to_string(),
        };
        values.insert(key, value);
    }
    Ok(values)
}

/// Read before the real parse, because the file supplies that parse's defaults.
fn config_path(args: &[OsString]) -> Option<PathBuf> {
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let text = arg.to_string_lossy();
        if text == "--config" {
            return rest.next().map(PathBuf::from);
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os("CONFIG_FILE")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
}

fn known_keys(command: &Command) -> Vec<String> {
    let mut keys: Vec<String> = settings_of(command)
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect();
    for subcommand in command.get_subcommands() {
        keys.extend(known_keys(subcommand));
    }
    keys.sort();
    keys.dedup();
    keys
}

/// A setting is an argument with an environment variable; the rest (`--help`, `--config`) belongs to one invocation.
fn settings_of(command: &Command) -> impl Iterator<Item = &Arg> {
    command
        .get_arguments()
        .filter(|arg| arg.get_env().is_some() && arg.get_long() != Some("config"))
}

fn with_file_defaults(command: Command, file: &BTreeMap<String, String>) -> Command {
    command
        .mut_args(|arg| match arg.get_long().and_then(|long| file.get(long)) {
            // A list's default is one string here; the argument's delimiter splits it.
            Some(value) => arg.required(false).default_value(value.clone()),
            None => arg,
        })
        .mut_subcommands(|subcommand| with_file_defaults(subcommand, file))
}

fn effective(command: &Command, matches: &ArgMatches, file: &BTreeMap<String, String>) -> Effective {
    let mut entries = Vec::new();
    let (command, matches) = match matches.subcommand() {
        Some((name, matches)) => match command.find_subcommand(name) {
            Some(subcommand) => (subcommand, matches),
            None => (command, matches),
        },
        None => (command, matches),
    };
    for arg in settings_of(command) {
        let id = arg.get_id().as_str();
        let flag = arg.get_long().unwrap_or(id).to_owned();
        let join = |values: Vec<String>| values.join(",");
        let value = matches
            .get_raw(id)
            .map(|values| join(values.map(|value| value.to_string_lossy().into_owned()).collect()));
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => "flag",
            Some(ValueSource::EnvVariable) => "environment",
            Some(_) if file.contains_key(&flag) => "file",
            Some(_) => "default",
            None => "not set",
        };
        let default = join(
            arg.get_default_values()
                .iter()
                .map(|value| value.to_string_lossy().into_owned())
                .collect(),
        );
        let value = value.unwrap_or_default();
        entries.push(Entry {
            value: if arg.is_hide_env_values_set() {
                mask(&value)
            } else {
                value
            },
            variable: arg
                .get_env()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            default: if file.contains_key(&flag) {
                String::new()
            } else {
                default
            },
            help: arg.get_help().map(|help| help.to_string()).unwrap_or_default(),
            flag,
            source,
        });
    }
    Effective { entries }
}

/// Keeps what helps to find a mistake (user, host, database) and hides the password.
fn mask(value: &str) -> String {
    if value.is_empty() {
        return String::new();
    }
    let Some((scheme, rest)) = value.split_once("://") else {
        return "***".to_owned();
    };
    match rest.rsplit_once('@') {
        Some((user_info, host)) => {
            let user = user_info.split(':').next().unwrap_or_default();
            // The query may carry a password as well.
            let host = host.split('?').next().unwrap_or_default();
            format!("{scheme}://{user}:***@{host}")
        }
        None => format!("{scheme}://{}", rest.split('?').next().unwrap_or_default()),
    }
}

impl Effective {
    /// One line per setting: name, value, where it comes from.
    pub fn to_text(&self) -> String {
        let width = self
            .entries
            .iter()
            .map(|entry| entry.flag.len())
            .max()
            .unwrap_or_default();
        self.entries
            .iter()
            .map(|entry| format!("{:width$} = {}  ({})\n", entry.flag, entry.value, entry.source))
            .collect()
    }

    /// The reference table of README: flag, variable, default, meaning.
    pub fn to_markdown(&self) -> String {
        let mut text = String::from("| setting | variable | default | meaning |\n| --- | --- | --- | --- |\n");
        for entry in &self.entries {
            let default = if entry.default.is_empty() {
                String::new()
            } else {
                format!("`{}`", entry.default)
            };
            let help = entry.help.replace('\n', " ").replace('|', "\\|");
            text.push_str(&format!(
                "| `{}` | `{}` | {default} | {help} |\n",
                entry.flag, entry.variable
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_url_keeps_user_and_host_only() {
        assert_eq!(
            mask("postgres://app:s3cret@db:5432/shop?sslpassword=x"),
            "postgres://app:***@db:5432/shop"
        );
        assert_eq!(mask("hunter2"), "***");
        assert_eq!(format!("{:?}", Secret::from_str("hunter2").unwrap()), "***");
    }
}
