//! A RetentionPolicy from a YAML file, taken as the API server would take it.

use std::path::Path;

use kube::CustomResourceExt;
use serde_json::Value;

use super::exit::{Exit, Failure};
use crate::api::{Parsed, PolicyRules, RetentionPolicy};
use crate::store::read_bounded;

/// Largest file that is read, in bytes: an object of a cluster has no more.
const MAX_FILE: u64 = 2 << 20;

/// A policy's name and rules.
pub fn read(path: &Path) -> Result<(String, PolicyRules), Failure> {
    let text = match path.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin().lock()).map(String::into_bytes),
        false => read_bounded(path, MAX_FILE),
    };
    let text = text.map_err(|e| Failure::file("read", path, &e))?;
    let text = String::from_utf8_lossy(&text);
    parse(&text).map_err(|message| {
        Failure::new(Exit::Usage, format!("{}: {message}", path.display()))
            .hint("it should be a RetentionPolicy of larder.dev/v1alpha1, as for `kubectl apply`")
    })
}

fn parse(text: &str) -> Result<(String, PolicyRules), String> {
    let mut policies = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let value: Value = serde::Deserialize::deserialize(document).map_err(|e| e.to_string())?;
        match (value["apiVersion"].as_str(), value["kind"].as_str()) {
            _ if value.is_null() => {}
            (Some("larder.dev/v1alpha1"), Some("RetentionPolicy")) => policies.push(value),
            // Other objects may stand beside it.
            (Some(_), Some(_)) => {}
            _ => return Err("an object without apiVersion or kind".to_owned()),
        }
    }
    let policy = match policies.len() {
        1 => policies.remove(0),
        0 => return Err("there is no RetentionPolicy in it".to_owned()),
        more => return Err(format!("there are {more} RetentionPolicies in it")),
    };
    check_schema(&policy["spec"])?;
    // By itself, as only so an error has the field's name.
    serde_path_to_error::deserialize::<_, PolicyRules>(&policy["spec"])
        .map_err(|error| format!("spec.{}: {}", error.path(), error.inner()))?;
    let parsed: Parsed<RetentionPolicy> = serde_json::from_value(policy).map_err(|e| e.to_string())?;
    let policy = parsed.object.map_err(|invalid| invalid.to_string())?;
    policy.spec.rules.check().map_err(|invalid| invalid.to_string())?;
    Ok((policy.metadata.name.unwrap_or_default(), policy.spec.rules))
}

/// What the CRD's schema says of single fields, and what reading them does not find: fields that there are not, which
/// would be left out in silence, texts of another form, numbers and lengths out of bounds.
fn check_schema(spec: &Value) -> Result<(), String> {
    let crd = serde_json::to_value(RetentionPolicy::crd()).map_err(|e| e.to_string())?;
    let known = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    for (field, value) in spec.as_object().into_iter().flatten() {
        let Some(schema) = known.get(field) else {
            return Err(format!("spec.{field}: there is no such field"));
        };
        check_field(schema, value).map_err(|wrong| format!("spec.{field}: {value} {wrong}"))?;
    }
    Ok(())
}

fn check_field(schema: &Value, value: &Value) -> Result<(), String> {
    let (size, bounds) = match value {
        Value::Number(number) => (number.as_f64().unwrap_or(f64::NAN), ["minimum", "maximum"]),
        Value::String(text) => (text.chars().count() as f64, ["minLength", "maxLength"]),
        Value::Object(map) => (map.len() as f64, ["minProperties", "maxProperties"]),
        _ => return Ok(()),
    };
    let [least, most] = bounds.map(|bound| schema[bound].as_f64());
    if least.is_some_and(|least| size < least) || most.is_some_and(|most| size > most) {
        let bound = |bound: Option<f64>| bound.map_or("any".to_owned(), |bound| bound.to_string());
        return Err(format!("is not within {} to {}", bound(least), bound(most)));
    }
    if let (Some(text), Some(pattern)) = (value.as_str(), schema["pattern"].as_str()) {
        let form = regex::Regex::new(pattern).map_err(|e| e.to_string())?;
        if !form.is_match(text) {
            return Err(format!("does not match {pattern}"));
        }
    }
    let of_each = &schema["additionalProperties"];
    for (key, value) in value.as_object().into_iter().flatten() {
        check_field(of_each, value).map_err(|wrong| format!("has {key}: {value}, which {wrong}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: larder.dev/v1alpha1\nkind: RetentionPolicy\nmetadata: {name: night}\n";

    #[test]
    fn a_policy_is_read_with_its_defaults() {
        let text = format!("{HEAD}spec: {{nodeSelector: {{}}, maxAge: 30d, maxSize: 50Gi}}\n");
        let (name, rules) = parse(&text).unwrap();
        assert_eq!(name, "night");
        assert_eq!(rules.max_size(), Ok(Some(50 << 30)));
        assert_eq!((rules.min_copies, &*rules.schedule), (1, "@daily"));
        // Others may stand beside it, as in a folder that is applied as a whole.
        let beside = format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: x}}\n---\n{text}---\n");
        assert_eq!(parse(&beside).unwrap().1, rules);
    }

    #[test]
    fn what_the_api_server_would_refuse_is_named() {
        for (spec, message) in [
            ("{nodeSelector: {}, maxage: 30d}", "spec.maxage: there is no such field"),
            ("{maxAge: 30d}", "nodeSelector"),
            ("{nodeSelector: {}, maxAge: soon}", "spec.maxAge: "),
            ("{nodeSelector: {}, maxSize: -1}", "spec.maxSize: "),
            ("{nodeSelector: {}, minCopies: 0}", "spec.minCopies: "),
            ("{nodeSelector: {}, minCopies: many}", "minCopies"),
            (
                "{nodeSelector: {}, minCopies: 1001}",
                "spec.minCopies: 1001 is not within 1 to 1000",
            ),
            ("{nodeSelector: {}, priority: 1000001}", "spec.priority: "),
            (
                "{nodeSelector: {pool: -edge}}",
                "has pool: \"-edge\", which does not match",
            ),
            ("{nodeSelector: {}, schedule: never}", "never"),
            // The parser of schedules knows more than the API server takes.
            ("{nodeSelector: {}, schedule: '@yearly'}", "spec.schedule: "),
            ("{nodeSelector: {}, schedule: '0 3 L * *'}", "spec.schedule: "),
            ("{nodeSelector: {}, timeZone: ''}", "spec.timeZone: "),
            ("{nodeSelector: {}, timeZone: ../etc/passwd}", "spec.timeZone: "),
            ("{nodeSelector: {}, timeZone: Mars/Base}", "Mars/Base"),
            ("[]", "spec"),
        ] {
            let error = parse(&format!("{HEAD}spec: {spec}\n")).unwrap_err();
            assert!(error.contains(message), "{spec}: {error}");
        }
        for (text, message) in [
            ("", "no RetentionPolicy"),
            ("kind: RetentionPolicy\n", "without apiVersion"),
            ("apiVersion: v1\nkind: Pod\n", "no RetentionPolicy"),
            ("apiVersion: [", "line"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
        let two = format!("{HEAD}spec: {{nodeSelector: {{}}}}\n---\n{HEAD}spec: {{nodeSelector: {{}}}}\n");
        assert!(parse(&two).unwrap_err().contains("2 RetentionPolicies"));
    }
}
