"""The report of a study: tables, figures and one page, all made from its store and nothing else."""

from thanos.study.report.build import Report as Report
from thanos.study.report.build import build_report as build_report
from thanos.study.report.build import write_report as write_report
from thanos.study.report.readme import update_readme as update_readme
from thanos.study.report.readme import with_results as with_results
