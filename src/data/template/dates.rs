//! The function `strftime_now` of chat templates.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, or what the environment variable `SOURCE_DATE_EPOCH` says: with it, a template that writes the
/// day's date gives the same text on any day.
pub(super) fn now() -> i64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    fixed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64))
}

/// `strftime` in universal time, for the directives that chat templates use; others stay as they are.
pub(super) fn strftime(format: &str, seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds.div_euclid(86_400);
    let second = seconds.rem_euclid(86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = DAYS[days.rem_euclid(7) as usize];
    let hour = second / 3600;
    let mut result = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            result.push(character);
            continue;
        }
        let directive = characters.next().unwrap_or('%');
        let unpadded = directive == '-';
        let directive = if unpadded { characters.next().unwrap_or('-') } else { directive };
        let number = |value: i64| if unpadded { value.to_string() } else { format!("{value:02}") };
        match directive {
            'Y' => result.push_str(&year.to_string()),
            'y' => result.push_str(&number(year.rem_euclid(100))),
            'm' => result.push_str(&number(month)),
            'd' => result.push_str(&number(day)),
            'H' => result.push_str(&number(hour)),
            'I' => result.push_str(&number((hour + 11) % 12 + 1)),
            'p' => result.push_str(if hour < 12 { "AM" } else { "PM" }),
            'M' => result.push_str(&number(second / 60 % 60)),
            'S' => result.push_str(&number(second % 60)),
            'B' => result.push_str(month_name),
            'b' => result.push_str(&month_name[..3]),
            'A' => result.push_str(weekday),
            'a' => result.push_str(&weekday[..3]),
            '%' => result.push('%'),
            other => result.extend(['%', other]),
        }
    }
    result
}

/// Year, month and day of a day counted from 1970-01-01 in the Gregorian calendar (Hinnant, "chrono-compatible low-level date
/// algorithms"): years begin in March, so that the leap day is the last of its year.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y, %A %H:%M:%S", 951_782_400 + 3661), "29 Feb 2000, Tuesday 01:01:01");
        assert_eq!(strftime("%-d %B %y %I%p %%", 1_735_689_600), "1 January 25 12AM %");
    }
}
